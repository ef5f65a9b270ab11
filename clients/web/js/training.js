// The part that both pages have: train, watch the loss, compare, and keep, export or forget yours.

import { drawLosses } from "./chart.js";
import { $, element, say } from "./page.js";
import { forgetAdapter, keepAdapter, keptAdapter } from "./storage.js";
import { PageError } from "./strict.js";

const NAMES = { base: "Base", global: "Global", yours: "Yours" };
const COLUMNS = {
  loss: ["Loss", (value) => value.toFixed(4)],
  top1: ["First guess right", percent],
  top3: ["One of three right", percent],
  accuracy: ["Right", percent],
};

/** Wire the training panel; `messages()` gives what is trained on, `changed()` is told of adapters. */
export async function trainingPanel(bundle, { messages, unit, changed }) {
  const { manifest, call } = bundle;
  const state = { training: false, yours: false, kept: false }; // kept: in this browser

  const enable = () => {
    $("train").disabled = state.training || !bundle.canTrain;
    $("stop").disabled = !state.training;
    $("compare").disabled = state.training;
    $("export").disabled = state.training || !state.yours;
    $("forget").disabled = state.training || !state.kept;
    $("import").disabled = state.training;
    $("import-global").disabled = state.training;
  };
  const setYours = (is, kept = is) => {
    Object.assign(state, { yours: is, kept });
    $("yours-state").textContent = is
      ? "There is one. It is also kept in this browser (IndexedDB), and in no other place."
      : "There is none yet: train one, or import a file.";
    enable();
  };
  const guarded = (act) => async (event) => {
    try {
      await act(event);
    } catch (error) {
      say(error.message, true);
    } finally {
      state.training = false;
      enable();
    }
  };

  const compare = async (quiet = false) => {
    const { held, found } = await call("evaluate", {
      messages: messages(), heldOut: Number($("held-out").value) / 100,
    });
    if (held) {
      $("measures").replaceChildren(measuresTable(found, held));
    } else {
      $("measures").replaceChildren(element("p", {}, "Fewer than 10 messages: none is held out, so " +
        "there is nothing to compare on."));
    }
    if (!quiet) say(held ? "Compared on what no adapter was trained on here." : "Nothing to compare on.");
  };

  const train = async () => {
    const config = {
      steps: numberIn("steps"), learningRate: numberIn("learning-rate"), batchSize: 8,
      heldOut: numberIn("held-out") / 100, seed: numberIn("seed"), weightDecay: 0,
    };
    state.training = true;
    enable();
    $("stop").focus();
    $("progress").max = config.steps;
    $("progress").value = 0;
    say("Training: first the measure before …");
    const losses = [];
    const done = await call("train", { messages: messages(), config }, ({ step, loss }) => {
      losses.push(loss);
      $("progress").value = step;
      $("progress-text").textContent = `Step ${step} of ${config.steps}, loss ${loss.toFixed(3)}`;
      drawLosses($("chart"), losses, config.steps, unit);
      if (step % 10 === 0) say(`Training: step ${step} of ${config.steps}, loss ${loss.toFixed(2)}`);
    });
    $("losses").replaceChildren(...done.losses.map((loss, i) => (
      element("tr", {}, [element("td", {}, String(i + 1)), element("td", {}, loss.toFixed(6))]))));
    if (done.kept) {
      await keepAdapter(manifest.base, await call("save", { which: "yours" }));
      setYours(true);
    }
    await compare(true);
    await changed();
    $("measures").prepend(element("p", {}, outcome(done)));
    say(outcome(done));
    $("train").disabled = false;
    $("train").focus();
  };

  $("train").addEventListener("click", guarded(train));
  $("stop").addEventListener("click", () => call("stop"));
  $("compare").addEventListener("click", guarded(() => compare()));
  $("export").addEventListener("click", guarded(async () => {
    const bytes = await call("save", { which: "yours" });
    const url = URL.createObjectURL(new Blob([bytes], { type: "application/octet-stream" }));
    element("a", { href: url, download: "my-adapter.safetensors" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
    say(`Exported: my-adapter.safetensors, ${bytes.length.toLocaleString("en")} bytes. ` +
      "It was made from your messages: give it only to whom you would show them.");
  }));
  const importing = (button, file, which) => {
    $(button).addEventListener("click", () => $(file).click());
    $(file).addEventListener("change", guarded(async (event) => {
      const [chosen] = event.target.files;
      if (!chosen) return;
      const bytes = new Uint8Array(await chosen.arrayBuffer());
      event.target.value = "";
      await call("load", { which, bytes, name: chosen.name });
      if (which === "yours") {
        await keepAdapter(manifest.base, bytes);
        setYours(true);
      }
      await changed();
      say(`Imported ${chosen.name} as the ${which === "yours" ? "personal" : "global"} adapter.`);
    }));
  };
  importing("import", "import-file", "yours");
  importing("import-global", "import-global-file", "global");
  $("forget").addEventListener("click", guarded(async () => {
    await forgetAdapter(manifest.base);
    await call("load", { which: "yours", bytes: null });
    setYours(false);
    for (const place of ["chart", "losses", "measures"]) $(place).replaceChildren();
    $("progress").value = 0;
    $("progress-text").textContent = "";
    await changed();
    $("train").focus();
    say("Forgotten: your adapter is gone from this page and from the browser's IndexedDB. " +
      "Files that you exported are still where you saved them.");
  }));

  const kept = await keptAdapter(manifest.base).catch(() => undefined);
  try {
    if (kept) await call("load", { which: "yours", bytes: kept, name: "the adapter kept here" });
    setYours(Boolean(kept));
  } catch (error) { // a bundle of the same base with other layers, say: the page is of use all the same
    setYours(false, true);
    $("yours-state").textContent = `${error.message}. Forget it, or train another in its place.`;
  }
  if (!bundle.canTrain) say("This bundle has no train graph: export it with --train 8x32.", true);
}

function measuresTable(found, held) {
  const measures = Object.keys(Object.values(found)[0]);
  const head = ["Adapter", ...measures.map((name) => COLUMNS[name][0])];
  const rows = Object.entries(found).map(([which, values]) => element("tr", { "data-adapter": which }, [
    element("th", { scope: "row" }, NAMES[which]),
    ...measures.map((name) => (
      element("td", { "data-measure": name, "data-value": values[name] }, COLUMNS[name][1](values[name])))),
  ]));
  return element("table", {}, [
    element("caption", {}, `On ${held} examples that were held out; loss in nats, lower is better`),
    element("thead", {}, element("tr", {}, head.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, rows),
  ]);
}

function outcome({ kept, replaced, before, after, losses, learnt, held }) {
  const did = `Trained on ${counted(learnt, "example")} for ${counted(losses.length, "step")}.`;
  if (!held) return `${did} Kept without a judgement: with fewer than 10 messages none is held out.`;
  const loss = `Held-out loss ${after.loss.toFixed(3)}, before ${before.loss.toFixed(3)} ` +
    `(${NAMES[replaced].toLowerCase()}), on ${held} others.`;
  return kept ? `${did} ${loss} It is better and is now yours.`
    : `${did} ${loss} It is not better, so it was dropped: what was there before stays.`;
}

function counted(number, word) {
  return `${number} ${word}${number === 1 ? "" : "s"}`;
}

function numberIn(id) {
  const field = $(id);
  if (!field.checkValidity()) {
    throw new PageError(`${field.labels[0].textContent.trim()}: expected ${field.min} to ` +
      `${field.max}, found ${field.value || "nothing"}`);
  }
  return Number(field.value);
}

function percent(share) {
  return Number.isNaN(share) ? "–" : `${(100 * share).toFixed(1)} %`;
}
