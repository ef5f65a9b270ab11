// The watch: a person's sensor stream replayed, with the guesses of every adapter side by side.

import { $, element, open, say } from "./page.js";
import { trainingPanel } from "./training.js";

const NAMES = { base: "Base", global: "Global", yours: "Yours" };
const ROW = 110, LEFT = 44, PAUSE = 700; // ms between two windows
const SECONDS = 2;
const seen = {}; // window → which adapters were right, for the tally
let bundle, timer = 0, busy = false;

async function start() {
  bundle = await open("classification");
  const { person } = bundle;
  if (!person) throw new Error("no sensor stream: fedlora web --bundle DIR of the watch base makes one");
  $("person").textContent = `Person and wrist ${person.client}: ${person.test} windows of ${SECONDS} s, ` +
    `the end of each exercise. Training sees the ${person.train} windows before them.`;
  $("position").max = person.test - 1;
  for (const name of ["play", "next", "position"]) $(name).disabled = false;
  await trainingPanel(bundle, { messages: () => [], unit: "nats per window", changed });
  await show(0);
  $("play").addEventListener("click", toggle);
  $("next").addEventListener("click", () => show(Number($("position").value) + 1));
  $("position").addEventListener("input", () => show(Number($("position").value)));
}

/** An adapter came or went: what was counted of it is no longer true. */
async function changed() {
  for (const key of Object.keys(seen)) delete seen[key];
  await show(Number($("position").value));
}

function toggle() {
  if (timer) {
    clearInterval(timer);
    timer = 0;
  } else {
    timer = setInterval(() => show(Number($("position").value) + 1, false), PAUSE);
  }
  $("play").textContent = timer ? "Pause" : "Play";
}

async function show(position, aloud = true) {
  if (busy) return;
  busy = true;
  try {
    const { person } = bundle, index = position % person.test;
    const { values, target, guesses } = await bundle.call("window", { index });
    $("position").value = index;
    $("position-text").textContent = `${index + 1} of ${person.test}`;
    $("truth").textContent = `The person did: ${person.labels[target]}`;
    drawSignal($("signal"), values);
    const best = (shares) => shares.indexOf(Math.max(...shares));
    seen[index] = Object.fromEntries(Object.entries(guesses).map(([which, shares]) => [
      which, best(shares) === target]));
    $("guesses").replaceChildren(...Object.entries(guesses).map(([which, shares]) => (
      column(which, shares, target, person.labels))));
    if (aloud) {
      $("spoken").textContent = Object.entries(guesses).map(([which, shares]) => (
        `${NAMES[which]}: ${person.labels[best(shares)]}`)).join("; ");
    }
  } catch (error) {
    say(error.message, true);
  } finally {
    busy = false;
  }
}

function column(which, shares, target, labels) {
  const best = shares.indexOf(Math.max(...shares));
  const counted = Object.values(seen).filter((one) => which in one);
  const right = counted.filter((one) => one[which]).length;
  const rows = shares.map((share, index) => {
    const bar = element("meter", { min: 0, max: 1, value: share, "aria-label": labels[index] });
    return element("li", { class: index === best ? "best" : null }, [
      element("span", { class: "label" }, labels[index]), bar,
      element("span", { class: "share" }, `${Math.round(100 * share)} %`)]);
  });
  return element("div", { class: "column", "data-adapter": which }, [
    element("h3", {}, NAMES[which]),
    element("p", { class: best === target ? "right" : "wrong" },
      `${best === target ? "✓ right" : "✗ wrong"}; ${right} of ${counted.length} windows so far`),
    element("ul", { class: "bars" }, rows),
  ]);
}

/** Two plots above one another: the three axes of acceleration, and of rotation. */
function drawSignal(place, values) {
  const svg = (tag, attributes, text = []) => element(tag, attributes, text, true);
  const width = Math.max(280, place.clientWidth), time = values.length / 6, parts = [];
  ["acceleration (g)", "rotation (rad/s)"].forEach((kind, group) => {
    const top = group * ROW + 18, height = ROW - 30;
    const part = values.subarray(group * 3 * time, (group + 1) * 3 * time);
    const most = Math.max(...part.map(Math.abs), 1e-6);
    const y = (value) => top + height / 2 - (value / most) * (height / 2);
    parts.push(svg("text", { x: LEFT, y: top - 5 }, kind),
      svg("line", { x1: LEFT, x2: width, y1: y(0), y2: y(0), class: "grid" }),
      svg("text", { x: LEFT - 6, y: top + 8, "text-anchor": "end" }, most.toFixed(1)),
      svg("text", { x: LEFT - 6, y: top + height, "text-anchor": "end" }, (-most).toFixed(1)));
    for (let axis = 0; axis < 3; axis += 1) {
      const points = Array.from({ length: time }, (_, i) => (
        `${LEFT + (i / (time - 1)) * (width - LEFT)},${y(part[axis * time + i]).toFixed(1)}`));
      parts.push(svg("polyline", { points: points.join(" "), class: `axis${axis}` }));
    }
  });
  parts.push(svg("text", { x: width, y: 13, "text-anchor": "end", class: "legend" },
    "x solid, y dashed, z dotted"));
  for (const second of [0, 0.5, 1, 1.5, 2]) {
    const x = LEFT + (second / SECONDS) * (width - LEFT);
    const anchor = second === SECONDS ? "end" : "middle";
    parts.push(svg("text", { x, y: 2 * ROW + 8, "text-anchor": anchor }, `${second} s`));
  }
  place.replaceChildren(svg("svg", {
    viewBox: `0 0 ${width} ${2 * ROW + 18}`, role: "img",
    "aria-label": "Two seconds of acceleration and rotation, three axes each",
  }, parts));
}

start().catch((error) => say(error.message, true));
