// The page: what happens on a click or a key, and its state in the address.

import { $, Latest, ask, complain, events, later, nats, say, show } from "/base.js";
import * as adapters from "/adapters.js";
import * as fit from "/fit.js";
import * as text from "/write.js";

const FIELDS = { p: "prompt", t: "temperature", seed: "seed", n: "tokens", s: "system", b: "budget", name: "label", m: "method", d: "direction", l: "layer" };

// ---- the address -----------------------------------------------------------------------------------

function remember() {
  const link = new URLSearchParams(Object.entries(FIELDS).map(([key, id]) => [key, $(id).value]));
  if (!$("system-details").open) link.delete("s");
  link.set("c", JSON.stringify(Object.fromEntries([...adapters.adapters.values()].map((a) => [a.label, a.c]))));
  if ($("preset").value) link.set("set", $("preset").selectedOptions[0].textContent);
  else for (const side of ["positive", "negative"]) link.set(side, $(side).value);
  history.replaceState(null, "", `#${link}`);
  written = location.hash;
}

let written = location.hash;
const soon = later(250, remember);

// Another link in the same tab is another page; a jump to a place on this one (#ask) is not.
addEventListener("hashchange", () => { if (location.hash.includes("=") && location.hash !== written) location.reload(); });

/** The page as a link has it. Nothing is fitted before a click. */
function recall() {
  const link = new URLSearchParams(location.hash.slice(1));
  if (![...link.keys()].length) return;
  const preset = [...$("preset").options].find((option) => option.textContent === link.get("set"));
  if (preset) fit.choose(preset.value);
  for (const side of ["positive", "negative"]) if (link.has(side)) { $("preset").value = ""; $(side).value = link.get(side); }
  for (const [key, id] of Object.entries(FIELDS)) if (link.has(key)) $(id).value = link.get(key);
  $("system-details").open = Boolean(link.get("s"));
  try {
    const scales = Object.entries(JSON.parse(link.get("c") ?? "{}")).filter(([, c]) => Number.isFinite(c) && Math.abs(c) <= 8);
    adapters.want(Object.fromEntries(scales));
    const missing = scales.map(([label]) => label).filter((label) => ![...known].includes(label));
    const label = $("label").value, others = missing.filter((other) => other !== label).join(", ");
    if (missing.includes(label)) say(`This link has sentences for ${label}: press Fit to make it.${others && ` It has a scale of ${others} too, which isn’t on this page.`}`);
    else if (others) say(`This link has a scale of ${others}, which isn’t on this page.`);
  } catch {
    complain("The scales in this link can’t be read. The rest of it is here.");
  }
}

let known = new Set();

// ---- the system prompt's figures --------------------------------------------------------------------

const comparing = new Latest();

function compare() {
  const system = $("system").value.trim();
  $("system-figures").textContent = $("f-system").textContent = "";
  if (!system || !$("system-details").open) return comparing.stop();
  const waiting = $("system-figures").textContent = "Measuring what it costs…";
  return comparing.run(async (signal) => {
    const a = adapters.judged(), label = a?.label;
    for await (const event of events("/api/system", { system, adapter: a?.id ?? "" }, signal)) {
      const effect = event.effect === null ? "" : adapters.effectOn(event.effect, label);
      $("f-system").textContent = `Damage ${nats(event.kl)}${effect}`;
      $("system-figures").textContent = `This prompt: damage ${show(event.kl)} nats a token on the same answers, at the same tokens${effect ? `, effect ${show(event.effect, true)} nats on the lines that ${label} hasn’t seen` : ""}.`;
    }
  }).then(() => { if (!comparing.busy && $("system-figures").textContent === waiting) $("system-figures").textContent = "Not measured."; });
}

// ---- clicks and keys --------------------------------------------------------------------------------

function on(id, kind, work) {
  $(id).addEventListener(kind, (event) => { if (kind === "submit") event.preventDefault(); work(event); });
}

async function start() {
  let state;
  try {
    state = await ask("/api/state");
  } catch (error) {
    $("model").textContent = "";
    return complain(error.message);
  }
  $("model").textContent = `${state.model}, ${state.blocks} blocks, ${state.dtype}`;
  $("system-details").hidden = !state.system;
  known = new Set(state.adapters.map((a) => a.label));
  fit.setUp(state);
  const again = later(400, () => { if ($("live").checked && text.written) text.write(true); });
  const write = () => { again.cancel(); text.write(); }; // it has the scales of now
  const stop = () => {
    again.cancel(); text.stop(); text.stopSweep(); fit.stopFit(); comparing.stop();
    say("Stopped.");
  };
  recall();
  adapters.setUp(state, () => { soon(); again(); });
  on("ask", "submit", write);
  on("sweep", "submit", () => text.sweep());
  on("fit", "submit", () => fit.fit());
  on("map-go", "click", () => fit.map());
  on("map-table", "keydown", fit.walk);
  on("stop", "click", stop);
  on("copy", "click", async () => {
    remember();
    try { await navigator.clipboard.writeText(location.href); say("The link is copied: it holds the prompt, the scales and the sentences."); } catch { say("The address of this page is the link."); }
  });
  on("system-details", "toggle", compare);
  const measureSystem = later(600, compare);
  on("system", "input", measureSystem);
  document.addEventListener("fitted", () => { if ($("live").checked && text.written) text.write(true); });
  document.addEventListener("judged", compare);
  document.addEventListener("listed", soon); // the address names adapters by their labels
  document.addEventListener("input", soon);
  document.addEventListener("change", soon);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); write(); }
    else if (event.key === "Escape") stop();
  });
  compare();
  document.body.dataset.ready = "yes";
}

start();
