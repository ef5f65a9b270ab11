// Next-token logits, a few tokens at a time: fedlora/device/decoding.py.
//
// What was read is {ids: rows of one length, logits: {data} of (rows, vocabulary), cache}.

import { idsTensor } from "./runtime.js";

export class Decoder {
  #last = null;

  constructor(runtime, factors) {
    Object.assign(this, { runtime, factors, graph: runtime.graphOf("decode") });
  }

  /** Read one row; what the last call read of it already is not read again. */
  async resume(ids) {
    const last = this.#last;
    let same = 0;
    if (last?.cache) {
      const before = last.ids[0];
      while (same < Math.min(before.length, ids.length) && before[same] === ids[same]) same += 1;
      if (same === ids.length && same === before.length) return last;
      same = Math.min(same, ids.length - 1);
    }
    const cache = same ? cut(last.cache, same) : null;
    this.#last = await this.#run([ids], [ids.slice(same)], cache);
    return this.#last;
  }

  /** Read one more token of some rows of `read`. */
  async more(read, rows, tokens) {
    const ids = rows.map((row, index) => [...read.ids[row], tokens[index]]);
    return this.#run(ids, tokens.map((token) => [token]), read.cache && take(read.cache, rows));
  }

  async #run(ids, fresh, cache) {
    const { runtime } = this;
    if (!this.graph) {
      const { dims, data } = await runtime.logits(idsTensor(ids), this.factors);
      const [, time, size] = dims, last = new Float32Array(ids.length * size);
      ids.forEach((_, row) => {
        const end = (row + 1) * time * size;
        last.set(data.subarray(end - size, end), row * size);
      });
      return { ids, logits: last, cache: null };
    }
    const names = (await runtime.session(this.graph)).inputNames
      .filter((name) => name.startsWith("past_key_values."));
    const past = cache ?? await this.#empty(names, ids.length);
    const present = names.map((name) => name.replace("past_key_values", "present"));
    const feeds = { inputs: idsTensor(fresh), ...past, ...this.factors };
    const found = await runtime.run(this.graph, feeds, ["logits", ...present]);
    const kept = Object.fromEntries(names.map((name, i) => [name, found[present[i]]]));
    return { ids, logits: found.logits.data, cache: kept };
  }

  async #empty(names, rows) {
    const { inputMetadata = [] } = await this.runtime.session(this.graph);
    return Object.fromEntries(names.map((name) => {
      const [, heads, , size] = inputMetadata.find((one) => one.name === name).shape;
      return [name, { dims: [rows, heads, 0, size], data: new Float32Array(0) }];
    }));
  }
}

function cut(cache, positions) {
  return mapped(cache, ({ dims: [rows, heads, past, size], data }) => {
    const kept = new Float32Array(rows * heads * positions * size);
    for (let head = 0; head < rows * heads; head += 1) {
      const from = head * past * size;
      kept.set(data.subarray(from, from + positions * size), head * positions * size);
    }
    return { dims: [rows, heads, positions, size], data: kept };
  });
}

function take(cache, chosen) {
  return mapped(cache, ({ dims: [, heads, past, size], data }) => {
    const block = heads * past * size, kept = new Float32Array(chosen.length * block);
    chosen.forEach((row, i) => kept.set(data.subarray(row * block, (row + 1) * block), i * block));
    return { dims: [chosen.length, heads, past, size], data: kept };
  });
}

function mapped(cache, change) {
  return Object.fromEntries(Object.entries(cache).map(([name, value]) => [name, change(value)]));
}
