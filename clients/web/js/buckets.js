// Batches of any size through train graphs of fixed sizes: fedlora/device/buckets.py.
//
// Of all ways to cut the sorted rows into graphs the cheapest is taken; the pieces' losses and
// gradients, weighted by their share of the counted targets, add up to those of the whole batch.

import { PageError } from "./strict.js";

const IGNORED = -100n;
const PASS = 64; // what a pass costs before its first position, in positions

/** The train graphs, the shortest rows first, then the fewest, then by name. */
export function bucketsOf(manifest) {
  return Object.entries(manifest.graphs).filter(([, graph]) => graph.kind === "train")
    .sort(([, a], [, b]) => (a.positions ?? 0) - (b.positions ?? 0) || a.rows - b.rows);
}

/** The tokens of the longest row that a train graph takes. */
export function longestRow(manifest) {
  return Math.max(0, ...bucketsOf(manifest).map(([, graph]) => graph.positions ?? 0)) || 64;
}

/** Cut rows into pieces {graph, inputs, targets: tensors' {dims, data}, weight}. */
export function piecesOf(rows, manifest) {
  const isText = !manifest.input_shape.length;
  const length = (row) => (isText ? row.inputs.length : 1);
  const counted = (row) => (isText ? row.targets.length : 1);
  const order = rows.map((_, index) => index)
    .sort((a, b) => length(rows[a]) - length(rows[b]) || a - b).map((index) => rows[index]);
  const total = order.reduce((sum, row) => sum + counted(row), 0);
  let start = 0;
  return planOf(order.map(length), bucketsOf(manifest)).map(([name, graph, count]) => {
    const taken = order.slice(start, start + count);
    start += count;
    const weight = taken.reduce((sum, row) => sum + counted(row), 0) / total;
    const filled = isText ? textPiece(graph, taken) : featurePiece(graph, taken, manifest);
    return { graph: name, weight, ...filled };
  });
}

/** Divide rows, sorted by length, among graphs: [name, graph, rows of it], in order. */
function planOf(lengths, graphs) {
  const longest = lengths.at(-1) ?? 0;
  const holds = (graph, length) => graph.positions === null || length <= graph.positions;
  if (!graphs.some(([, graph]) => holds(graph, longest))) {
    throw new PageError(graphs.length
      ? `a row has ${longest} tokens, more than this bundle's train graphs take; export it again ` +
        `with --train 2x${Math.ceil(longest / 16) * 16}`
      : "this bundle has no train graph; export it again with --train 8x32");
  }
  const cheapest = [{ cost: 0 }];
  lengths.forEach((length, index) => {
    let best = null;
    for (const [name, graph] of graphs) {
      if (!holds(graph, length)) continue;
      const count = Math.min(index + 1, graph.rows);
      const cost = cheapest[index + 1 - count].cost + graph.rows * (graph.positions ?? 1) + PASS;
      const isFirst = best && cost === best.cost && name < best.name; // as Python's tuples compare
      if (!best || cost < best.cost || isFirst) best = { cost, name, graph, count };
    }
    cheapest.push(best);
  });
  const plan = [];
  for (let left = lengths.length; left; left -= plan[0][2]) {
    const { name, graph, count } = cheapest[left];
    plan.unshift([name, graph, count]);
  }
  return plan;
}

function textPiece(graph, rows) {
  const dims = [graph.rows, graph.positions];
  const inputs = new BigInt64Array(graph.rows * graph.positions);
  const targets = new BigInt64Array(inputs.length).fill(IGNORED);
  for (let row = 0; row < graph.rows; row += 1) {
    // Rows to fill up are copies of the first: a model may divide by what padding makes zero.
    const from = rows[row] ?? rows[0];
    from.inputs.forEach((id, i) => { inputs[row * graph.positions + i] = BigInt(id); });
    if (row >= rows.length) continue;
    from.targets.forEach((id, i) => { targets[row * graph.positions + i] = BigInt(id); });
  }
  return { inputs: { dims, data: inputs }, targets: { dims, data: targets } };
}

function featurePiece(graph, rows, manifest) {
  const size = manifest.input_shape.reduce((a, b) => a * b, 1);
  const inputs = new Float32Array(graph.rows * size);
  const targets = new BigInt64Array(graph.rows).fill(IGNORED);
  for (let row = 0; row < graph.rows; row += 1) {
    inputs.set((rows[row] ?? rows[0]).inputs, row * size);
    if (row < rows.length) targets[row] = BigInt(rows[row].targets);
  }
  return {
    inputs: { dims: [graph.rows, ...manifest.input_shape], data: inputs },
    targets: { dims: [graph.rows], data: targets },
  };
}
