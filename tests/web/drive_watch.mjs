// Clicks through the watch page in headless Chromium and prints what it saw as JSON.
//
// node drive_watch.mjs ORDER.json, whose keys are: playwright, browser, url, steps. Prints STOP when
// the server is to be stopped, and ends at a line on stdin.

import fs from "node:fs";
import { createRequire } from "node:module";

const order = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
const { chromium } = createRequire(import.meta.url)(order.playwright);
const browser = await chromium.launch({
  executablePath: order.browser,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"],
});
try {
  const page = await browser.newPage();
  const seen = { errors: [] };
  page.on("pageerror", (error) => seen.errors.push(String(error)));
  await page.goto(`${order.url}watch.html`);
  await page.waitForSelector("body[data-state=ready]", { timeout: 240000 });
  await page.waitForSelector("#guesses li");
  seen.person = await page.textContent("#person");
  await page.click("summary >> text=Settings");
  await page.fill("#steps", String(order.steps));
  await page.click("#train");
  await page.waitForSelector("#status >> text=Trained on", { timeout: 300000 });
  seen.losses = await page.$$eval("#losses tr", (rows) => rows.map((row) => Number(row.cells[1].textContent)));
  seen.measures = await page.$$eval("#measures tbody tr", (rows) => Object.fromEntries(rows.map((row) => [
    row.dataset.adapter,
    Object.fromEntries([...row.querySelectorAll("td")].map((cell) => (
      [cell.dataset.measure, Number(cell.dataset.value)]))),
  ])));

  // Every window once: the tally must end as the table says.
  const count = Number(await page.getAttribute("#position", "max")) + 1;
  for (let index = 1; index < count; index += 1) {
    await page.click("#next");
    await page.waitForFunction((text) => document.getElementById("position-text").textContent === text &&
      document.querySelector("#guesses .column p"), `${index + 1} of ${count}`);
  }
  await page.waitForTimeout(300);
  seen.tally = await page.$$eval("#guesses .column", (columns) => Object.fromEntries(columns.map((one) => [
    one.dataset.adapter, one.querySelector("p").textContent])));
  console.log("STOP");
  await new Promise((resolve) => { process.stdin.once("data", resolve); });
  process.stdin.destroy();
  console.log(JSON.stringify(seen));
} finally {
  await browser.close();
}
