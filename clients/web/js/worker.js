// The worker in which everything is computed. It has no way to the network: what it needs is sent
// to it by the page, and its own Content-Security-Policy allows no connection at all.
//
// A message is {id, call, args}; the answer {id, result} or {id, error}; {id, step, loss} on the way.

import * as ort from "../vendor/ort.wasm.bundle.min.mjs";
import { decodePacked, encodePacked, initialAdapter } from "./adapter.js";
import { longestRow } from "./buckets.js";
import { Decoder } from "./decoder.js";
import { evaluate } from "./evaluate.js";
import { divide, encodeMessages } from "./examples.js";
import { numbersOf, parseTensors } from "./safetensors.js";
import { softmax } from "./scoring.js";
import { Runtime } from "./runtime.js";
import { PageError, sha256 } from "./strict.js";
import { suggest, Words } from "./suggest.js";
import { Tokenizer } from "./tokenizer.js";
import { train } from "./trainer.js";

const FEWEST = 10; // messages of which some are held out; with fewer the measure would be chance
let runtime, tokenizer, words, person = null, stopped = false;
const adapters = { base: null, global: null, yours: null };
const decoders = {}, factors = {};

const calls = {
  /** Check the bundle's files against its manifest and open it. */
  async open({ manifest, files, wasm, global, stream }) {
    if (!manifest.web) {
      throw new PageError("this bundle is not for browsers: export it again with --web");
    }
    for (const [name, about] of Object.entries(manifest.files)) {
      if (files[name] && await sha256(files[name]) !== about.sha256) {
        throw new PageError(`${name}: its SHA-256 is not the manifest's; export the bundle again`);
      }
    }
    ort.env.wasm.numThreads = 1; // the same steps on every machine
    ort.env.wasm.wasmBinary = wasm;
    runtime = new Runtime(ort, manifest, files);
    if (manifest.task === "next-token") {
      const text = new TextDecoder().decode(files["tokenizer.json"]);
      tokenizer = new Tokenizer(JSON.parse(text));
      words = new Words(tokenizer, manifest.outputs);
    }
    if (stream) person = readStream(stream, manifest);
    use("base", null);
    if (global) use("global", await decodePacked(global, manifest, "the global adapter"));
    return { canTrain: Boolean(runtime.graphOf("train")), person: person?.about ?? null };
  },

  /** Load a packed file as "global" or "yours"; null takes it away. */
  async load({ which, bytes, name }) {
    use(which, bytes && await decodePacked(bytes, runtime.manifest, name));
    return Boolean(bytes);
  },

  async save({ which }) {
    return encodePacked(adapters[which], { made_by: "fedlora web" });
  },

  /** Suggestions of every adapter that there is, by its name. */
  async suggest({ text, k }) {
    const found = {};
    for (const which of present()) {
      decoders[which] ??= new Decoder(runtime, factors[which]);
      found[which] = await suggest(decoders[which], tokenizer, words, text, k);
    }
    return found;
  },

  /**
   * Train a new adapter from the global one, or from the base, as fedlora device personalize.
   *
   * The last part of the messages, or the person's test part, judges it; it is kept if its loss there
   * is lower than that of what was served before.
   */
  async train({ messages, config }, report) {
    const [learnt, held] = examples(messages, config.heldOut);
    if (!learnt.length) throw new PageError("there is nothing to train on: write a message first");
    const replaced = present().at(-1);
    const before = held.length ? await evaluate(runtime, held, factors[replaced]) : null;
    const init = adapters.global ?? await initialAdapter(runtime.manifest, config.seed);
    stopped = false;
    const onStep = async (step, loss) => {
      report({ step, loss });
      await new Promise((resolve) => { setTimeout(resolve); }); // lets a stop be heard
      return !stopped;
    };
    const { adapter, losses } = await train(runtime, init, learnt, config, onStep);
    const fed = runtime.factors(adapter);
    const after = held.length ? await evaluate(runtime, held, fed) : null;
    const kept = !held.length || after.loss < before.loss;
    if (kept) use("yours", adapter);
    return { kept, replaced, before, after, losses, learnt: learnt.length, held: held.length };
  },

  stop() {
    stopped = true;
  },

  /** Held-out measures of every adapter that there is. */
  async evaluate({ messages, heldOut }) {
    const [, held] = examples(messages, heldOut);
    const found = {};
    for (const which of held.length ? present() : []) {
      found[which] = await evaluate(runtime, held, factors[which]);
    }
    return { held: held.length, found };
  },

  /** One window of the person's stream: the values, the truth, and everyone's probabilities. */
  async window({ index }) {
    const row = person.test[index], { input_shape: shape, outputs } = runtime.manifest;
    const guesses = {};
    for (const which of present()) {
      const inputs = { dims: [1, ...shape], data: row.inputs };
      const logits = await runtime.logits(inputs, factors[which]);
      guesses[which] = [...softmax(logits.data, 0, outputs)];
    }
    return { values: row.inputs, target: row.targets, guesses };
  },
};

function use(which, adapter) {
  if (which !== "base" && !adapter) {
    adapters[which] = null;
    delete factors[which];
  } else {
    adapters[which] = adapter;
    factors[which] = runtime.factors(adapter);
  }
  delete decoders[which];
}

function present() {
  return ["base", "global", "yours"].filter((which) => factors[which]);
}

function examples(messages, heldOut) {
  if (person) return [person.train, person.test];
  const longest = longestRow(runtime.manifest);
  const parts = messages.length < FEWEST ? [messages, []] : divide(messages, heldOut);
  return parts.map((part) => encodeMessages(part, tokenizer, longest));
}

/** The person's file that the server made: windows to train on and to replay. */
function readStream(bytes, manifest) {
  const { tensors, metadata } = parseTensors(bytes, "the sensor stream");
  const size = manifest.input_shape.reduce((a, b) => a * b, 1);
  const rows = (part) => {
    const inputs = numbersOf(tensors[`${part}_inputs`]);
    return [...numbersOf(tensors[`${part}_targets`])].map((target, index) => (
      { inputs: inputs.slice(index * size, (index + 1) * size), targets: target }));
  };
  const found = { train: rows("train"), test: rows("test") };
  const about = { ...JSON.parse(metadata.about), train: found.train.length, test: found.test.length };
  return { ...found, about };
}

onmessage = async ({ data: { id, call, args } }) => {
  try {
    const result = await calls[call](args, (progress) => postMessage({ id, ...progress }));
    postMessage({ id, result });
  } catch (error) {
    postMessage({ id, error: error.message ?? String(error) });
  }
};
