// Sessions of ONNX Runtime over a bundle's graphs, opened when they are first used.

import { factorsOf } from "./adapter.js";
import { PageError } from "./strict.js";

const DATA = "base.onnx.data";

export class Runtime {
  #sessions = new Map();
  #last = Promise.resolve(); // the end of what ONNX Runtime does now

  /** ort: the module; files: name → Uint8Array, checked against the manifest already. */
  constructor(ort, manifest, files) {
    Object.assign(this, { ort, manifest, files });
  }

  /** The name of the only graph of a kind, undefined where there is none. */
  graphOf(kind) {
    return Object.keys(this.manifest.graphs).find((name) => this.manifest.graphs[name].kind === kind);
  }

  async session(name) {
    if (!this.#sessions.has(name)) {
      const made = this.#alone(() => this.ort.InferenceSession.create(this.files[name], {
        executionProviders: ["wasm"],
        externalData: [{ path: DATA, data: this.files[DATA] }],
        logSeverityLevel: 3,
      }));
      this.#sessions.set(name, made);
    }
    return this.#sessions.get(name);
  }

  /** Run a graph: feeds and results are name → {dims or shape, data}. */
  async run(name, feeds, fetches) {
    const session = await this.session(name);
    const tensors = {};
    for (const input of session.inputNames) {
      const value = feeds[input];
      if (!value) throw new PageError(`${name}: nothing to feed its input ${input}`);
      const type = value.data instanceof BigInt64Array ? "int64" : "float32";
      tensors[input] = new this.ort.Tensor(type, value.data, value.dims ?? value.shape);
    }
    const found = await this.#alone(() => session.run(tensors, fetches));
    return Object.fromEntries(fetches.map((fetch) => [
      fetch, { dims: found[fetch].dims, data: found[fetch].data },
    ]));
  }

  /**
   * Do one thing after the other. A run keeps its arguments on the stack of the one WebAssembly
   * memory while it waits, so two at a time (typing during a training) would tread on each other.
   */
  async #alone(act) {
    const before = this.#last;
    let done;
    this.#last = new Promise((resolve) => { done = resolve; });
    await before;
    try {
      return await act();
    } finally {
      done();
    }
  }

  /** Logits of rows of one width: {data, dims}. */
  async logits(inputs, factors) {
    const name = this.graphOf("infer");
    if (!name) throw new PageError("this bundle has no infer.onnx; export it again");
    const { logits } = await this.run(name, { inputs, ...factors }, ["logits"]);
    return logits;
  }

  /** What is fed for an adapter, null for the base. */
  factors(adapter) {
    return factorsOf(adapter, this.manifest);
  }
}

/** Token ids as a tensor's {dims, data}; rows of one length. */
export function idsTensor(rows) {
  const width = rows[0].length;
  const data = BigInt64Array.from(rows.flat(), BigInt);
  return { dims: [rows.length, width], data };
}
