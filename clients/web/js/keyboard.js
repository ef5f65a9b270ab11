// The keyboard: what base, global and your adapter suggest while you type, and your messages.

import { messagesOf } from "./examples.js";
import { $, element, open, say } from "./page.js";
import { trainingPanel } from "./training.js";

const COUNT = 3, QUIET = 900; // suggestions; ms without a key before they are read out
const NAMES = { base: "Base", global: "Global", yours: "Yours" };
let bundle, asking = false, again = false, timer = 0;

const messages = () => messagesOf($("messages").value);

async function start() {
  bundle = await open("next-token");
  for (const name of ["text", "add", "messages"]) $(name).disabled = false;
  await trainingPanel(bundle, { messages, unit: "nats per token", changed: refresh });
  await refresh();
  $("text").addEventListener("input", refresh);
  $("compose").addEventListener("submit", add);
  $("messages").addEventListener("input", count);
  count();
}

/** Ask for suggestions; while an answer is on its way only the newest text is asked for next. */
async function refresh() {
  if (asking) {
    again = true;
    return;
  }
  asking = true;
  try {
    do {
      again = false;
      show(await bundle.call("suggest", { text: $("text").value, k: COUNT }));
    } while (again);
  } catch (error) {
    say(error.message, true);
  } finally {
    asking = false;
  }
}

function show(found) {
  for (const which of Object.keys(NAMES)) {
    const place = $(`words-${which}`), words = found[which];
    place.replaceChildren(...(words ?? []).map(({ word, probability }) => {
      const share = `${Math.round(100 * probability)} %`;
      const button = element("button", { type: "button", "aria-label": `${word}, ${share}` }, [
        element("span", { class: "word" }, word), element("span", { class: "share" }, share)]);
      button.addEventListener("click", () => take(word));
      return element("li", {}, button);
    }));
    $(`none-${which}`).hidden = Boolean(words);
  }
  clearTimeout(timer);
  timer = setTimeout(() => {
    const best = found.yours ?? found.global ?? found.base;
    $("spoken").textContent = best.length
      ? `Suggestions: ${best.map((one) => one.word).join(", ")}` : "No suggestion";
  }, QUIET);
}

/** Put a suggested word in place of the letters that were typed of it. */
function take(word) {
  const field = $("text");
  const kept = field.value.replace(/[\p{L}\p{N}\p{M}'’]*$/u, "");
  const gap = kept && !/\s$/u.test(kept) ? " " : "";
  field.value = `${kept}${gap}${word} `;
  field.focus();
  refresh();
}

function add(event) {
  event.preventDefault();
  const field = $("text"), text = field.value.trim();
  if (!text) return;
  const before = $("messages").value.replace(/\n*$/, "");
  $("messages").value = `${before}${before ? "\n" : ""}${text}\n`;
  field.value = "";
  count();
  say(`Added to your messages; there are ${messages().length}.`);
  refresh();
}

function count() {
  const { length } = messages();
  $("count").textContent = `${length} message${length === 1 ? "" : "s"}`;
}

start().catch((error) => say(error.message, true));
