// Loading: everything is fetched once, handed to the worker, and then the page closes its own door.
//
// A Content-Security-Policy can only be made stricter: once all is there, one that allows nothing is
// added, and from then on the browser itself refuses every connection of this page.

import { PageError } from "./strict.js";

const CACHE = "fedlora-web-1";
const WASM = "vendor/ort-wasm-simd-threaded.wasm";

export const $ = (id) => document.getElementById(id);

/** An element with attributes and children; SVG's where `svg` is set. */
export function element(tag, attributes = {}, children = [], svg = false) {
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...[children].flat());
  return made;
}

/** What a screen reader is told, and everyone sees. */
export function say(text, isError = false) {
  const place = $("status");
  place.textContent = text;
  place.classList.toggle("error", isError);
}

/** Open the bundle for a task: {manifest, call, about}. */
export async function open(task) {
  const bytesOf = async (path) => new Uint8Array(await (await fetched(path)).arrayBuffer());
  const offline = registered();
  const setup = await (await fetched("setup.json")).json();
  for (const link of document.querySelectorAll("nav a")) {
    link.hidden = !setup.bundles[link.dataset.task];
  }
  const about = setup.bundles[task];
  if (!about) throw new PageError(`no bundle for this page: fedlora web --bundle DIR of a ${task} base`);
  const folder = `bundles/${task}`;
  const manifest = await (await fetched(`${folder}/manifest.json`)).json();
  const files = {};
  for (const name of Object.keys(manifest.files)) {
    if (name === "canaries.safetensors") continue; // a device's self-test: not needed here
    say(`Loading ${name} …`);
    files[name] = await bytesOf(`${folder}/${name}`);
  }
  say("Loading ONNX Runtime …");
  const wasm = await bytesOf(WASM);
  const global = about.global ? await bytesOf(`${folder}/global.safetensors`) : null;
  const stream = about.stream ? await bytesOf(`${folder}/stream.safetensors`) : null;
  const call = started();
  say("Opening the bundle …");
  const opened = await call("open", { manifest, files, wasm, global, stream });
  const reload = await offline;
  seal();
  const kept = reload ? "It opens again without a network." : "This browser keeps no copy for later.";
  say(`Ready: ${manifest.base_id}. Everything is loaded; from now on the browser blocks every ` +
    `connection of this page. ${kept}`);
  document.body.dataset.state = "ready";
  return { manifest, call, hasGlobal: about.global, ...opened };
}

/** Calls of the worker: call(name, args, onProgress) → a promise of its result. */
function started() {
  const worker = new Worker("js/worker.js", { type: "module" });
  const waiting = new Map();
  let last = 0;
  worker.onmessage = ({ data }) => {
    const { resolve, reject, onProgress } = waiting.get(data.id);
    if ("step" in data) {
      onProgress?.(data);
      return;
    }
    waiting.delete(data.id);
    if ("error" in data) reject(new PageError(data.error));
    else resolve(data.result);
  };
  worker.onerror = (event) => {
    for (const { reject } of waiting.values()) reject(new PageError(`the worker: ${event.message}`));
  };
  return (call, args = {}, onProgress = null) => new Promise((resolve, reject) => {
    last += 1;
    waiting.set(last, { resolve, reject, onProgress });
    worker.postMessage({ id: last, call, args });
  });
}

/** A file of the server, kept for a reload without it. */
async function fetched(path) {
  const cache = "caches" in window ? await caches.open(CACHE) : null;
  let found;
  try {
    found = await fetch(path);
  } catch (error) {
    const kept = await cache?.match(path);
    if (kept) return kept;
    throw new PageError(`${path}: the server does not answer; is fedlora web still running?`);
  }
  if (!found.ok) throw new PageError(`${path}: the server answered ${found.status}`);
  await cache?.put(path, found.clone());
  return found;
}

/** Whether the service worker is there, within ten seconds. */
async function registered() {
  if (!("serviceWorker" in navigator)) return false;
  try {
    await navigator.serviceWorker.register("sw.js", { updateViaCache: "all" });
    const late = new Promise((resolve) => { setTimeout(() => resolve(null), 10000); });
    return Boolean(await Promise.race([navigator.serviceWorker.ready, late]));
  } catch {
    return false;
  }
}

function seal() {
  const policy = "default-src 'none'; base-uri 'none'; form-action 'none'";
  document.head.append(element("meta", { "http-equiv": "Content-Security-Policy", content: policy }));
}
