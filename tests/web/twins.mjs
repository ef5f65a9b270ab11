// Runs the page's modules on what a test gives, and prints what they make of it as JSON.
//
// node twins.mjs ORDER.json, whose keys are the cases below and "modules", the folder of the page's
// modules. Bytes and float32 numbers travel as base64.

import fs from "node:fs";

const order = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
const load = (name) => import(`file://${order.modules}/${name}.js`);
const bytes = (text) => new Uint8Array(Buffer.from(text, "base64"));
const floats = (text) => new Float32Array(bytes(text).buffer);
const text = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength).toString("base64");

const adapter = await load("adapter"), examples = await load("examples"), buckets = await load("buckets");
const { AdamW } = await load("optimizer"), { Tokenizer } = await load("tokenizer");
const { nextTokenSums } = await load("scoring"), { splitText, Words } = await load("suggest");
const { pythonFloat } = await load("strict");

const cases = {
  rows({ tokenizer, messages, longest }) {
    return examples.encodeMessages(messages, new Tokenizer(tokenizer), longest);
  },

  messages({ text: lines }) {
    return examples.messagesOf(lines);
  },

  async batches(all) {
    const found = [];
    for (const { count, steps, batchSize, seed } of all) {
      const drawn = [];
      const batches = examples.drawBatches(count, { steps, batchSize, seed }, "owner", "personal");
      for await (const rows of batches) drawn.push(rows);
      found.push(drawn);
    }
    return found;
  },

  divided(all) {
    return all.map(([count, heldOut]) => examples.divide(Array(count).fill(0), heldOut)[0].length);
  },

  async initial({ manifest, seed }) {
    return text(await adapter.encodePacked(await adapter.initialAdapter(manifest, seed)));
  },

  async again({ file, manifest, provenance }) {
    return text(await adapter.encodePacked(await adapter.decodePacked(bytes(file), manifest), provenance));
  },

  async refused(all) {
    return Promise.all(all.map(({ file, manifest }) => (
      adapter.decodePacked(bytes(file), manifest).then(() => "taken", (error) => error.message))));
  },

  adamw({ row, gradients, rate, decay }) {
    const values = floats(row), optimizer = new AdamW(values.length, rate, decay);
    for (const gradient of gradients) optimizer.step(values, floats(gradient));
    return text(values);
  },

  pieces({ manifest, batches }) {
    return batches.map((lengths) => {
      const rows = lengths.map((length, index) => {
        const ids = Array.from({ length }, (_, i) => 1 + index * 100 + i);
        return { inputs: ids, targets: ids };
      });
      return buckets.piecesOf(rows, manifest).map(({ graph, weight, inputs, targets }) => ({
        graph, weight, inputs: [...inputs.data].map(Number), targets: [...targets.data].map(Number),
      }));
    });
  },

  words({ tokenizer, vocabulary, allowed }) {
    const words = new Words(new Tokenizer(tokenizer), vocabulary);
    const where = (mask) => [...mask.keys()].filter((id) => mask[id]);
    return {
      begins: where(words.begins), continues: where(words.continues),
      ends: words.ends.sort((a, b) => a - b), first: words.first,
      allowed: allowed.map(([spelt, need]) => words.allowed(spelt, need)),
    };
  },

  split(all) {
    return all.map((one) => splitText(one));
  },

  sums({ logits, vocabulary, row }) {
    return nextTokenSums(floats(logits), 0, vocabulary, row);
  },

  floats(all) {
    return all.map(pythonFloat);
  },
};

const found = {};
for (const [name, args] of Object.entries(order.cases)) found[name] = await cases[name](args);
console.log(JSON.stringify(found));
