// Two lists of sentences become an adapter; the map over blocks and scales.

import { $, Latest, complain, element, events, say, show } from "/base.js";
import { adapters, budget, list, sync } from "/adapters.js";

const fitting = new Latest(), mapping = new Latest();
let state, presets, repaint = () => {}, last = Promise.resolve();

export const lines = (side) => $(side).value.split("\n").map((line) => line.trim()).filter(Boolean);

export function setUp(given) {
  state = given;
  presets = state.presets;
  $("preset").append(...presets.map((preset, i) => new Option(preset.name, i)));
  $("layer").max = state.blocks - 1;
  $("layer").value = Math.round(0.45 * (state.blocks - 1));
  for (const side of ["positive", "negative"]) $(side).addEventListener("input", () => { $("preset").value = ""; });
  $("preset").addEventListener("change", () => choose($("preset").value));
  $("budget").addEventListener("change", () => repaint());
  choose("0");
}

export function choose(i) {
  $("preset").value = i;
  const preset = presets[i];
  if (!preset) return;
  $("positive").value = preset.positive.join("\n");
  $("negative").value = preset.negative.join("\n");
  $("label").value = preset.name;
}

const recipe = () => ({
  positive: lines("positive"), negative: lines("negative"), method: $("method").value,
  direction: $("direction").value, layer: $("layer").valueAsNumber,
});

/** Fit what the form says, or another recipe; `c` is where the slider goes, the adapter's own place if null. */
export function fit(c = null, given = recipe(), label = $("label").value.trim()) {
  complain("");
  $("progress").hidden = false;
  $("progress").removeAttribute("value");
  say("Fitting…");
  const started = performance.now(), before = last;
  let arrived = false;
  last = fitting.run(async (signal) => {
    await before; // it was given up, but may have been put on before that
    const old = [...adapters.values()].find((a) => a.label === label && a.method);
    for await (const event of events("/api/fit", { ...given, label, replaces: old?.id ?? "" }, signal)) {
      if (event.kind === "progress") { $("progress").max = event.of; $("progress").value = event.done; }
      else if (event.kind === "fitted") {
        arrived = true;
        list(event.adapters, c);
        say(`Fitted ${label} in ${((performance.now() - started) / 1000).toFixed(1)} s.`);
        document.dispatchEvent(new CustomEvent("fitted"));
      }
    }
  }).finally(async () => { $("progress").hidden = !fitting.busy; if (!arrived) await sync(); });
  return last;
}

export const stopFit = () => { fitting.stop(); mapping.stop(); };

// ---- the map ---------------------------------------------------------------------------------------

export function map() {
  complain("");
  const body = recipe(), label = $("label").value.trim(), cs = state.map_scales[body.method], cells = new Map(), drawn = [];
  const words = ["method", "direction"].map((id) => $(id).selectedOptions[0].textContent.toLowerCase());
  const key = (layer, c) => `${layer} ${c}`;
  return mapping.run(async (signal) => {
    say("Drawing the map…");
    const started = performance.now();
    const stream = events("/api/map", { ...body, cs }, signal);
    const rows = state.layers.map((layer) => element("tr", {}, element("th", { scope: "row", textContent: layer }),
      ...cs.map((c) => {
        const button = element("button", { type: "button", disabled: true, textContent: "…", tabIndex: -1 });
        button.setAttribute("aria-label", `block ${layer}, c = ${show(c)}: not measured yet`);
        button.addEventListener("click", () => { $("layer").value = layer; chosen(cells, button); fit(c, { ...body, layer }, label); });
        cells.set(key(layer, c), button);
        return element("td", {}, button);
      })));
    const head = element("tr", {}, element("th", { scope: "col", textContent: "block, c" }), ...cs.map((c) => element("th", { scope: "col", textContent: show(c) })));
    for await (const event of stream) {
      if ($("map").hidden || !$("map-table").contains(rows[0])) {
        $("map-table").replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
        $("map-of").textContent = `Of ${label}: ${words.join(", ")}.`;
        $("map").hidden = false;
        repaint = () => drawn.forEach((cell) => paint(cells.get(key(cell.layer, cell.c)), cell, cells)); // for another budget
      }
      if (event.kind === "cell") { drawn.push(event); paint(cells.get(key(event.layer, event.c)), event, cells); }
      else if (event.kind === "end") say(`The map is drawn: ${cells.size} cells in ${((performance.now() - started) / 1000).toFixed(0)} s.`);
    }
  });
}

function chosen(cells, button) {
  cells.forEach((other) => other.classList.toggle("chosen", other === button));
}

function paint(button, { layer, c, effect, kl }, cells) {
  const over = kl === null || kl > budget(), strength = Math.min(1, Math.abs(effect ?? 0) / 2);
  const tint = `rgb(var(--${(effect ?? 0) >= 0 ? "up" : "down"}) / ${(0.08 + 0.4 * strength).toFixed(2)})`;
  button.disabled = false;
  button.textContent = effect === null ? "–" : (effect > 0 ? "+" : "") + effect.toFixed(2).replace("-", "−");
  button.title = `KL ${show(kl)} nats`;
  button.style.background = over ? `repeating-linear-gradient(45deg, transparent 0 5px, var(--line) 5px 6px), ${tint}` : tint;
  button.classList.toggle("over", over);
  button.setAttribute("aria-label", `block ${layer}, c = ${show(c)}: effect ${show(effect, true)}, KL ${show(kl)}${over ? ", over the budget" : ""}`);
  if (![...cells.values()].some((other) => other.tabIndex === 0)) button.tabIndex = 0;
}

/** Arrow keys walk over the map; Tab leaves it. */
export function walk(event) {
  const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
  const cell = event.target.closest("td");
  if (!step || !cell) return;
  event.preventDefault();
  const table = $("map-table").tBodies[0];
  const next = table.rows[cell.parentNode.sectionRowIndex + step[0]]?.cells[cell.cellIndex + step[1]]?.querySelector("button:enabled");
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}
