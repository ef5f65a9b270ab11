// Held-out measures of an adapter: fedlora/device/scoring.py's evaluate.

import { addTo, classSums, measuresOf, nextTokenSums } from "./scoring.js";
import { idsTensor } from "./runtime.js";

const LOGITS = 1 << 22; // at once: 16 MB
const ROWS = 16;

/** {loss, top1, top3} of text, {loss, accuracy} of features; `factors` as the runtime makes them. */
export async function evaluate(runtime, rows, factors) {
  const { manifest } = runtime, total = {};
  if (manifest.task !== "next-token") {
    const size = manifest.input_shape.reduce((a, b) => a * b, 1);
    for (let start = 0; start < rows.length; start += ROWS) {
      const part = rows.slice(start, start + ROWS);
      const data = new Float32Array(part.length * size);
      part.forEach((row, index) => data.set(row.inputs, index * size));
      const dims = [part.length, ...manifest.input_shape];
      const logits = await runtime.logits({ dims, data }, factors);
      part.forEach((row, index) => addTo(
        total, classSums(logits.data, index * manifest.outputs, manifest.outputs, row.targets)));
    }
    return measuresOf(total);
  }
  const sorted = [...rows].sort((a, b) => a.inputs.length - b.inputs.length);
  const most = Math.max(1, Math.min(512, Math.floor(LOGITS / manifest.outputs)));
  for (let start = 0; start < sorted.length;) {
    let stop = start + 1;
    while (stop < sorted.length && (stop + 1 - start) * sorted[stop].inputs.length <= most) stop += 1;
    const part = sorted.slice(start, stop);
    const width = part.at(-1).inputs.length;
    const ids = part.map((row) => [...row.inputs, ...Array(width - row.inputs.length).fill(0)]);
    const logits = await runtime.logits(idsTensor(ids), factors);
    part.forEach((row, index) => addTo(total, nextTokenSums(
      logits.data, index * width * manifest.outputs, manifest.outputs, row)));
    start = stop;
  }
  return measuresOf(total);
}
