// Messages as rows of tokens, and the batches that Python draws of them (fedlora/data).
//
// A row of text is {inputs, targets, starts}: arrays as long as the row, not padded; starts marks the
// targets that begin a word. A row of features is {inputs: Float32Array, targets: class}.

import { rng } from "./random.js";

// What str.strip takes away.
const BLANK = "[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+";
const ENDS = new RegExp(`^${BLANK}|${BLANK}$`, "g");

/** The messages of a text, one a line, without blank lines. */
export function messagesOf(text) {
  return text.split("\n").map((line) => line.replace(ENDS, "")).filter(Boolean);
}

/** The first part to train on and the last to judge by; the size is rounded as in Python. */
export function divide(items, heldOut) {
  const middle = Math.trunc(Number(((1 - heldOut) * items.length).toFixed(6)));
  return [items.slice(0, middle), items.slice(middle)];
}

/** Messages as rows: separator, tokens, separator; cut to `longest`. */
export function encodeMessages(messages, tokenizer, longest) {
  const starts = new Set([...tokenizer.vocabulary]
    .filter(([token]) => token.startsWith("Ġ")).map(([, id]) => id));
  const { separator } = tokenizer;
  return messages.map((message) => {
    const ids = tokenizer.encode(message);
    const length = Math.min(ids.length + 1, longest);
    const targets = [...ids, separator].slice(0, length);
    return {
      inputs: [separator, ...ids].slice(0, length),
      targets,
      starts: targets.map((id, i) => id !== separator && (i === 0 || starts.has(id))),
    };
  });
}

/** Yield arrays of rows' indices: draw_batches of Python with `local_steps`. */
export async function* drawBatches(count, { steps, batchSize, seed }, client, round) {
  if (!count) return;
  const generator = await rng(seed, "batches", client, round);
  const rows = Math.min(batchSize, count);
  let order = [];
  for (let step = 0; step < steps; step += 1) {
    if (order.length < rows) order = [...order, ...generator.permutation(count)];
    yield order.slice(0, rows);
    order = order.slice(rows);
  }
}
