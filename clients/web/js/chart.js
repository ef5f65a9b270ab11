// A curve of losses as SVG: each step a dot, and the mean of the last steps as a line.

import { element } from "./page.js";

const HEIGHT = 260, LEFT = 56, RIGHT = 12, TOP = 28, BOTTOM = 44;
const MOST = 8; // steps whose mean is drawn at most: one batch says little

/** Draw losses into a place; `total` is how many steps there will be. */
export function drawLosses(place, losses, total, unit) {
  const width = Math.max(280, place.clientWidth); // drawn in its own size, so that text stays legible
  const window = Math.max(1, Math.min(MOST, Math.floor(total / 3)));
  const low = Math.min(...losses), high = Math.max(...losses);
  const ticks = ticksBetween(low, high), from = Math.min(low, ticks[0]);
  const to = Math.max(high, ticks.at(-1));
  const x = (step) => LEFT + ((step - 1) / Math.max(total - 1, 1)) * (width - LEFT - RIGHT);
  const y = (loss) => TOP + ((to - loss) / (to - from)) * (HEIGHT - TOP - BOTTOM);
  const means = losses.slice(window - 1).map((_, i) => (
    losses.slice(i, i + window).reduce((a, b) => a + b, 0) / window));
  const svg = (tag, attributes, text = []) => element(tag, attributes, text, true);
  const parts = ticks.flatMap((tick) => [
    svg("line", { x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick), class: "grid" }),
    svg("text", { x: LEFT - 8, y: y(tick) + 5, "text-anchor": "end" }, tick.toFixed(decimals(ticks))),
  ]);
  for (const step of stepTicks(total)) {
    parts.push(svg("text", { x: x(step), y: HEIGHT - 24, "text-anchor": "middle" }, String(step)));
  }
  const middle = LEFT + (width - LEFT - RIGHT) / 2;
  parts.push(
    svg("text", { x: middle, y: HEIGHT - 5, "text-anchor": "middle" }, "training step"),
    svg("text", {
      x: 0, y: 0, "text-anchor": "middle", transform: `translate(13 ${(HEIGHT - BOTTOM) / 2}) rotate(-90)`,
    }, `loss (${unit})`),
    svg("text", { x: LEFT, y: 13, class: "legend" }, `dots: one step; line: mean of ${window} steps`),
    ...losses.map((loss, i) => svg("circle", { cx: x(i + 1), cy: y(loss), r: 2.5, class: "dot" })),
    svg("polyline", {
      class: "mean", points: means.map((mean, i) => `${x(i + window)},${y(mean)}`).join(" "),
    }),
  );
  const label = means.length
    ? `Loss by training step: mean of the first ${window} steps ${means[0].toFixed(2)}, ` +
      `of the last ${window} ${means.at(-1).toFixed(2)} ${unit}`
    : `Loss by training step, ${losses.length} so far`;
  place.replaceChildren(svg("svg", {
    viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": label,
  }, parts));
}

function ticksBetween(low, high) {
  const span = Math.max(high - low, 0.05), raw = span / 4;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * unit).find((n) => n >= raw);
  const ticks = [];
  for (let n = Math.floor(low / step); n <= Math.ceil(high / step); n += 1) ticks.push(n * step);
  return ticks.length > 1 ? ticks : [ticks[0], ticks[0] + step];
}

function decimals(ticks) {
  return Math.max(0, -Math.floor(Math.log10(ticks[1] - ticks[0]) + 1e-9));
}

function stepTicks(total) {
  if (total <= 6) return Array.from({ length: total }, (_, i) => i + 1);
  return [1, ...[0.25, 0.5, 0.75, 1].map((share) => Math.round(total * share))];
}
