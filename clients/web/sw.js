// The page again without a network: files come from the server where it answers, else from the
// cache. The page itself puts the bundle's files there as it loads them, so none is fetched twice.
// Nothing that a person typed is ever in this cache.

const CACHE = "fedlora-web-1";
const PAGES = [
  "./", "index.html", "watch.html", "style.css", "icon.svg", "vendor/ort.wasm.bundle.min.mjs",
  ...[
    "adapter", "buckets", "chart", "decoder", "evaluate", "examples", "keyboard", "optimizer", "page",
    "random", "runtime", "safetensors", "scoring", "storage", "strict", "suggest", "tokenizer",
    "trainer", "training", "watch", "worker",
  ].map((name) => `js/${name}.js`),
];

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(PAGES))
    .then(() => self.skipWaiting()));
});

self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const own = new URL(event.request.url).origin === self.location.origin;
  if (event.request.method !== "GET" || !own) return;
  event.respondWith(answer(event.request));
});

async function answer(request) {
  const cache = await caches.open(CACHE);
  try {
    const found = await fetch(request);
    if (PAGES.some((name) => new URL(name, self.registration.scope).href === request.url) && found.ok) {
      await cache.put(request, found.clone());
    }
    return found;
  } catch (error) {
    const kept = await cache.match(request);
    if (kept) return kept;
    throw error;
  }
}
