// Local training in the page: what fedlora/device/trainer.py does, in the same order.

import { zeroFactors } from "./adapter.js";
import { piecesOf } from "./buckets.js";
import { drawBatches } from "./examples.js";
import { AdamW } from "./optimizer.js";
import { PageError } from "./strict.js";

/**
 * Train `init` on rows; returns {adapter, losses}. `init` stays as it is.
 *
 * config: {steps, batchSize, learningRate, seed}. onStep(step, loss) may return false to stop.
 */
export async function train(runtime, init, rows, config, onStep) {
  const { manifest } = runtime;
  const paths = Object.keys(init.layers); // sorted, A before B: the flat row of fedlora/flat.py
  const size = paths.reduce((sum, path) => (
    sum + init.layers[path].A.data.length + init.layers[path].B.data.length), 0);
  const row = new Float32Array(size), gradient = new Float32Array(size);
  const fed = { ...zeroFactors(manifest), ...zeroFactors(manifest, "frozen") };
  const parts = [];
  let start = 0;
  for (const path of paths) {
    for (const part of ["A", "B"]) {
      const { shape, data } = init.layers[path][part];
      row.set(data, start);
      const value = row.subarray(start, start += data.length);
      const scaling = part === "B" ? Math.fround(init.layers[path].scaling) : 1;
      const name = `${path}.lora_${part}`;
      parts.push({ path, part, shape, value, scaling, name, at: start - data.length });
      fed[`${name}.weight`] = { shape, data: value.map((number) => number * scaling) };
    }
  }
  const outputs = ["loss", ...parts.map((part) => `${part.name}.grad`)];
  const optimizer = new AdamW(size, config.learningRate, config.weightDecay);
  const losses = [];
  for await (const order of drawBatches(rows.length, config, "owner", "personal")) {
    const pieces = piecesOf(order.map((index) => rows[index]), manifest);
    let loss = 0;
    gradient.fill(0);
    for (const piece of pieces) {
      const feeds = { inputs: piece.inputs, targets: piece.targets, ...fed };
      const found = await runtime.run(piece.graph, feeds, outputs);
      loss += piece.weight * found.loss.data[0];
      const weight = Math.fround(piece.weight);
      for (const { name, at } of parts) {
        const slopes = found[`${name}.grad`].data;
        for (let i = 0; i < slopes.length; i += 1) gradient[at + i] += Math.fround(slopes[i] * weight);
      }
    }
    losses.push(loss);
    if (!Number.isFinite(loss)) {
      throw new PageError(`step ${losses.length}: expected a finite loss, found ${loss}; lower the ` +
        "learning rate");
    }
    for (const { at, value, scaling } of parts) {
      if (scaling !== 1) for (let i = 0; i < value.length; i += 1) gradient[at + i] *= scaling;
    }
    optimizer.step(row, gradient);
    for (const { name, value, scaling } of parts) {
      const { data } = fed[`${name}.weight`];
      for (let i = 0; i < value.length; i += 1) data[i] = value[i] * scaling;
    }
    if (await onStep?.(losses.length, loss) === false) break;
  }
  const layers = Object.fromEntries(paths.map((path) => [path, { ...init.layers[path] }]));
  for (const { path, part, shape, value } of parts) layers[path][part] = { shape, data: value.slice() };
  return { adapter: { ...init, layers }, losses };
}
