// Clicks through the keyboard page in headless Chromium and prints what it saw as JSON.
//
// node drive_keyboard.mjs ORDER.json, whose keys are: playwright (path of the package
// playwright-core), browser (path of Chromium), url, typed and pasted (messages), probe (a message's
// beginning), steps, heldOut (percent), exported (where to save the adapter).
//
// Prints STOP when the server is to be stopped, and goes on without it at a line on stdin.

import fs from "node:fs";
import { createRequire } from "node:module";

const order = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
const { chromium } = createRequire(import.meta.url)(order.playwright);
const browser = await chromium.launch({
  executablePath: order.browser,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"],
});
try {
  const context = await browser.newContext({ acceptDownloads: true });
  const page = await context.newPage();
  const errors = [], requests = [], seen = {};
  page.on("pageerror", (error) => errors.push(String(error)));
  page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
  context.on("request", (request) => requests.push(request.url()));
  await page.goto(order.url);
  await page.waitForSelector("body[data-state=ready]", { timeout: 240000 });
  await page.waitForSelector("#words-base button");
  seen.loaded = requests.length;
  seen.loadedAt = Date.now();

  // The first messages key by key into the keyboard, the others into the box.
  for (const [index, message] of order.typed.entries()) {
    if (index < 3) await page.type("#text", message);
    else await page.fill("#text", message);
    await page.press("#text", "Enter");
  }
  const typed = await page.inputValue("#messages");
  await page.fill("#messages", `${typed}${order.pasted.join("\n")}\n`);
  seen.count = await page.textContent("#count");
  await page.fill("#text", order.probe);
  const words = (which) => page.$$eval(`#words-${which} .word`, (all) => all.map((one) => one.textContent));
  await page.waitForTimeout(1500);
  seen.before = await words("base");

  await page.click("summary >> text=Settings");
  await page.fill("#steps", String(order.steps));
  await page.fill("#held-out", String(order.heldOut));
  await page.click("#train");
  // Typing goes on meanwhile, and must disturb nothing.
  await page.waitForFunction(() => document.getElementById("progress").value >= 2, null, { timeout: 200000 });
  await page.type("#text", "that we should go and see", { delay: 60 });
  await page.fill("#text", order.probe);
  await page.waitForSelector("#status >> text=Trained on", { timeout: 500000 });
  seen.status = await page.textContent("#status");
  seen.losses = await page.$$eval("#losses tr", (rows) => rows.map((row) => Number(row.cells[1].textContent)));
  seen.measures = await page.$$eval("#measures tbody tr", (rows) => Object.fromEntries(rows.map((row) => [
    row.dataset.adapter,
    Object.fromEntries([...row.querySelectorAll("td")].map((cell) => (
      [cell.dataset.measure, Number(cell.dataset.value)]))),
  ])));
  await page.waitForTimeout(1500);
  seen.after = await words("yours");
  seen.curve = await page.getAttribute("#chart svg", "aria-label");

  const [download] = await Promise.all([page.waitForEvent("download"), page.click("#export")]);
  await download.saveAs(order.exported);

  // The browser itself refuses every connection now, also to the server that the page came from.
  seen.refused = await page.evaluate(async () => ({
    fetch: await fetch("setup.json?leak").then(() => false, () => true),
    image: await new Promise((resolve) => {
      const image = new Image();
      image.onload = () => resolve(false);
      image.onerror = () => resolve(true);
      image.src = "icon.svg?leak";
    }),
    socket: await new Promise((resolve) => {
      try {
        const socket = new WebSocket(`ws://${location.host}/leak`);
        socket.onopen = () => resolve(false);
        socket.onerror = () => resolve(true);
      } catch {
        resolve(true);
      }
    }),
  }));
  seen.late = requests.slice(seen.loaded).filter((url) => !/^blob:|[?/]leak$/.test(url));

  await page.click("#forget");
  await page.waitForSelector("#status >> text=Forgotten");
  seen.forgotten = await page.evaluate(() => new Promise((resolve) => {
    const opening = indexedDB.open("fedlora", 1);
    opening.onsuccess = () => {
      const asked = opening.result.transaction("adapters").objectStore("adapters").count();
      asked.onsuccess = () => resolve(asked.result);
    };
  }));
  await page.setInputFiles("#import-file", order.exported);
  await page.waitForSelector("#status >> text=Imported");
  await page.waitForTimeout(1500);
  seen.imported = await words("yours");

  seen.leftAt = Date.now();
  console.log("STOP");
  await new Promise((resolve) => { process.stdin.once("data", resolve); });
  process.stdin.destroy();
  await page.reload();
  await page.waitForSelector("body[data-state=ready]", { timeout: 240000 });
  await page.waitForSelector("#words-yours button");
  seen.offline = await page.textContent("#status");

  // What is kept may fit no more. The page is of use all the same, and it can be forgotten.
  await page.evaluate(() => new Promise((resolve) => {
    const opening = indexedDB.open("fedlora", 1);
    opening.onsuccess = () => {
      const store = opening.result.transaction("adapters", "readwrite").objectStore("adapters");
      store.openCursor().onsuccess = (event) => {
        const asked = event.target.result.update(new Uint8Array([1, 2, 3]));
        asked.transaction.oncomplete = () => { opening.result.close(); resolve(); };
      };
    };
  }));
  await page.reload();
  await page.waitForSelector("#words-base button");
  seen.unfit = await page.textContent("#yours-state");
  await page.click("#forget");
  await page.waitForSelector("#status >> text=Forgotten");
  seen.trainable = await page.isEnabled("#train");
  seen.errors = errors.filter((line) => !/Content Security Policy|Failed to (load|fetch)|ERR_/.test(line));
  console.log(JSON.stringify(seen));
} finally {
  await browser.close();
}
