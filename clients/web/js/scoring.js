// How well logits do on examples: the sums of fedlora/device/scoring.py.

/** Sums over one row of text: nats, tokens; at word starts, right first and top three guesses. */
export function nextTokenSums(logits, offset, vocabulary, row) {
  const sums = { nats: 0, tokens: 0, top1: 0, top3: 0, wordStarts: 0 };
  row.targets.forEach((target, position) => {
    const at = offset + position * vocabulary;
    const { nats, before } = lossOf(logits, at, vocabulary, target);
    sums.nats += nats;
    sums.tokens += 1;
    if (row.starts[position]) {
      sums.wordStarts += 1;
      sums.top1 += before === 0 ? 1 : 0;
      sums.top3 += before < 3 ? 1 : 0;
    }
  });
  return sums;
}

/** Sums over one example of a classifier. */
export function classSums(logits, offset, classes, target) {
  const { nats, before } = lossOf(logits, offset, classes, target);
  return { nats, examples: 1, correct: before === 0 ? 1 : 0 };
}

/** The measures that sums are the parts of: loss in nats; shares in [0, 1]. */
export function measuresOf(sums) {
  if (sums.examples) return { loss: sums.nats / sums.examples, accuracy: sums.correct / sums.examples };
  const share = (count) => (sums.wordStarts ? count / sums.wordStarts : NaN);
  return { loss: sums.nats / sums.tokens, top1: share(sums.top1), top3: share(sums.top3) };
}

export function addTo(total, sums) {
  for (const [name, value] of Object.entries(sums)) total[name] = (total[name] ?? 0) + value;
  return total;
}

/** Probabilities of `count` logits from `offset` on. */
export function softmax(logits, offset, count) {
  let top = -Infinity, sum = 0;
  for (let i = 0; i < count; i += 1) top = Math.max(top, logits[offset + i]);
  const powers = new Float64Array(count);
  for (let i = 0; i < count; i += 1) {
    powers[i] = Math.exp(logits[offset + i] - top);
    sum += powers[i];
  }
  return powers.map((power) => power / sum);
}

function lossOf(logits, at, count, target) {
  const right = logits[at + target];
  let top = -Infinity, before = 0, sum = 0;
  for (let i = 0; i < count; i += 1) {
    top = Math.max(top, logits[at + i]);
    before += logits[at + i] > right ? 1 : 0;
  }
  for (let i = 0; i < count; i += 1) sum += Math.exp(logits[at + i] - top);
  return { nats: Math.log(sum) - (right - top), before };
}
