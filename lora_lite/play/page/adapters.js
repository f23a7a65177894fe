// The adapters: a slider each with what it costs beside it, the damage of all together, names, files.

import { $, Latest, ask, complain, download, element, events, failed, later, nats, say, show } from "/base.js";

export const adapters = new Map(); // id -> {id, label, says, fitted, c, curve: Map(c -> kl), poles: {1: budget, -1: budget}, nodes}
const wanted = new Map(); // label -> c, of the link that this page was opened with
const measuring = new Latest();
let furthest = 2, moved = () => {}, damage = null, exact = false, judge = "", unknown = "measuring…"; // or why a figure isn't there

export const scales = () => Object.fromEntries([...adapters.values()].map(({ id, c }) => [id, c]));
export const budget = () => Math.min($("budget").max, Math.max($("budget").min, $("budget").valueAsNumber || 0.1));

export function setUp(state, onMove) {
  furthest = state.furthest;
  moved = onMove;
  $("neutral").textContent = state.neutral;
  list(state.adapters);
  document.addEventListener("failed", sync);
  $("budget").value = budget(); // a link may have any
  $("budget").addEventListener("change", () => {
    $("budget").value = budget();
    for (const a of adapters.values()) { a.poles = {}; refresh(a); }
    measure();
    moved();
  });
}

export function want(values) { Object.entries(values).forEach(([label, c]) => wanted.set(label, c)); }

/** The adapters as the server has them now; those that stay keep their sliders. */
export function list(listed, c = null) {
  const before = new Map(adapters);
  const byLabel = new Map([...before.values()].map((a) => [a.label, a]));
  adapters.clear();
  for (const entry of listed) {
    const old = before.get(entry.id), former = byLabel.get(entry.label);
    const given = old?.c ?? c ?? wanted.get(entry.label) ?? former?.c;
    wanted.delete(entry.label);
    const toBudget = given === undefined ? Boolean(entry.method) : c === null && Boolean(former?.toBudget); // a fresh fit
    adapters.set(entry.id, { curve: new Map([[0, 0]]), poles: {}, effect: null, toBudget, ...old, ...entry, c: given ?? entry.start });
  }
  $("cards").replaceChildren(...[...adapters.values()].map(card));
  $("none").hidden = adapters.size > 0;
  $("damage").hidden = adapters.size === 0;
  const chosen = $("sweep-adapter").value;
  $("sweep-adapter").replaceChildren(...[...adapters.values()].map((a) => new Option(a.label, a.id)));
  if (adapters.has(chosen)) $("sweep-adapter").value = chosen;
  $("sweep-go").disabled = adapters.size === 0;
  measure();
  document.dispatchEvent(new Event("listed"));
}

/** Ask the server what it has, after an error or a fit that was given up: another tab, or that fit, may have changed it. */
export async function sync() {
  const names = (list) => JSON.stringify(list.map(({ id, label }) => [id, label]));
  try {
    const now = (await ask("/api/state")).adapters;
    if (names(now) !== names([...adapters.values()])) list(now);
  } catch { /* the server has gone: the error that led here says so */ }
}

function card(a) {
  const id = (part) => `${part}-${a.id}`;
  const n = (a.nodes = {
    range: element("input", { type: "range", id: id("range"), min: -furthest, max: furthest, step: 0.01 }),
    number: element("input", { type: "number", id: id("number"), min: -8, max: 8, step: "any" }),
    ticks: element("div"), facts: element("div", { className: "facts", id: id("facts") }),
    toBudget: element("button", { type: "button", className: "small", textContent: "Set to the budget" }),
  });
  n.range.setAttribute("aria-label", `Scale of ${a.label}`);
  n.range.setAttribute("aria-describedby", id("facts"));
  n.number.setAttribute("aria-label", `Scale of ${a.label}, as a number`);
  n.range.addEventListener("input", () => set(a, n.range.valueAsNumber));
  n.number.addEventListener("change", () => Number.isFinite(n.number.valueAsNumber) && set(a, Math.min(8, Math.max(-8, n.number.valueAsNumber))));
  n.toBudget.addEventListener("click", () => set(a, rounded(a.poles[a.c < 0 ? -1 : 1].c)));
  const says = element("span", { className: "says", textContent: a.says });
  return element("div", { className: "card", id: id("card") },
    element("h3", {}, element("span", { textContent: a.label }), says),
    element("div", { className: "slider" }, element("div", { className: "track" }, n.ticks, n.range), n.number),
    n.facts, element("div", { className: "actions" }, n.toBudget), files(a));
}

// Towards 0, so that it stays within the budget.
const rounded = (c) => Math.trunc(c * (Math.abs(c) < 0.1 ? 1000 : 100)) / (Math.abs(c) < 0.1 ? 1000 : 100);

export function set(a, c) {
  a.c = c;
  a.toBudget = false;
  a.nodes.number.value = Number(c.toFixed(3));
  measuring.stop(); // its figures are of the scale before
  unknown = "measuring…";
  refresh(a);
  estimate();
  soon();
  moved();
}

function refresh(a) {
  const { range, number, ticks, facts, toBudget } = a.nodes;
  range.value = a.c;
  if (document.activeElement !== number) number.value = Number(a.c.toFixed(3)); // or somebody types there
  const alone = along(a, a.c), about = a.curve.has(a.c) ? "" : "about ";
  range.setAttribute("aria-valuetext", `${show(a.c)}, damage ${alone === undefined ? "not measured" : about + nats(alone)}`);
  const poles = [-1, 1].filter((pole) => a.poles[pole]).map((pole) => a.poles[pole]);
  ticks.replaceChildren(...poles.filter((p) => p.met).map((p) => {
    const tick = element("span", { className: p.pole < 0 ? "tick low" : "tick", textContent: show(Number(p.c.toFixed(2))), title: `the budget of ${show(budget())} nats` });
    tick.style.left = `calc(${(100 * (p.c + furthest)) / (2 * furthest)}% + ${(-8 * p.c) / furthest}px)`; // a thumb is 16 px wide
    return tick;
  }));
  const lines = [alone === undefined ? `Damage alone: ${unknown}` : `Damage alone: ${about}${nats(alone)}.`];
  lines.push(poles.length < 2 ? `Budget of ${show(budget())} nats: ${unknown}` : `Budget of ${show(budget())} nats: ${poles.map(inWords).join(", ")}.`);
  if (a.fitted) lines.push(a.effect?.c === a.c ? `Effect on lines it hasn’t seen: ${show(a.effect.value, true)} nats a token.` : `Effect on lines it hasn’t seen: ${unknown}`);
  facts.replaceChildren(...lines.map((line) => element("p", { textContent: line })));
  toBudget.disabled = !a.poles[a.c < 0 ? -1 : 1];
}

function inWords(p) {
  const c = `c = ${show(p.c)}`;
  if (p.met) return c + (p.monotone ? "" : " (others too: the curve falls again)");
  return Math.abs(p.c) >= furthest ? `not reached at ${c}` : `${c} is within it, the curve jumps`;
}

/** The damage of an adapter alone at c, from what was measured: between two points along the root of KL. */
function along(a, c) {
  if (a.curve.has(c)) return a.curve.get(c);
  const known = [...a.curve.entries()].filter(([, kl]) => kl !== null).sort(([x], [y]) => x - y);
  const after = known.findIndex(([x]) => x > c);
  if (after <= 0) return undefined;
  const [[x0, k0], [x1, k1]] = [known[after - 1], known[after]];
  return (Math.sqrt(k0) + ((Math.sqrt(k1) - Math.sqrt(k0)) * (c - x0)) / (x1 - x0)) ** 2;
}

// ---- the damage of all -----------------------------------------------------------------------------

function meter(kl, measured) {
  const limit = budget(), part = kl === null ? 1 : Math.min(1, kl / (2 * limit));
  damage = kl;
  $("meter-bar").style.width = `${100 * part}%`;
  $("meter").classList.toggle("over", kl === null || kl > limit);
  $("meter").setAttribute("aria-valuemax", 2 * limit);
  $("meter").setAttribute("aria-valuenow", Math.min(kl ?? 2 * limit, 2 * limit));
  const times = kl > limit ? `${show(kl / limit)} times` : `${show((100 * kl) / limit)} % of`;
  const text = kl === null ? "Too large to measure, over the budget." : `${measured ? "" : "About "}${show(kl)} nats a token, ${times} the budget.`;
  $("meter").setAttribute("aria-valuetext", text);
  $("damage-text").textContent = text;
  $("f-adapted").textContent = `Damage ${measured ? "" : "about "}${nats(kl)}${effects()}`;
}

/** The fit whose lines the columns are measured on: the one that is on, if no other fit is. */
export function judged() {
  const on = [...adapters.values()].filter((a) => a.fitted && a.c);
  return on.length === 1 ? on[0] : undefined;
}

export const effectOn = (value, label) => `, effect ${show(value, true)} on ${label}`;

function effects() {
  const a = judged();
  return a?.effect?.c === a?.c && a ? effectOn(a.effect.value, a.label) : "";
}

function estimate() {
  const on = [...adapters.values()].filter((a) => a.c);
  const kl = on.length === 0 ? 0 : on.length === 1 ? along(on[0], on[0].c) : undefined;
  if (kl !== undefined) return meter(kl, on.length === 0);
  const text = unknown[0].toUpperCase() + unknown.slice(1);
  $("damage-text").textContent = text;
  $("meter").setAttribute("aria-valuetext", text);
  $("f-adapted").textContent = "";
}

export function measure() {
  const now = JSON.stringify([judged()?.id, judged()?.label]);
  if (now !== judge) document.dispatchEvent(new Event("judged"));
  judge = now;
  if (adapters.size === 0) { measuring.stop(); $("f-adapted").textContent = ""; return; }
  unknown = "measuring…";
  estimate();
  adapters.forEach(refresh);
  exact = false;
  measuring.run(async (signal) => {
    try {
      for await (const event of events("/api/measure", { scales: scales(), budget: budget() }, signal)) take(event);
      document.body.dataset.measured = JSON.stringify(scales());
    } finally {
      if (!signal.aborted) {
        unknown = "not measured.";
        adapters.forEach(refresh);
        if (!exact) estimate();
      }
    }
  });
}

function take(event) {
  const a = adapters.get(event.adapter);
  if (event.kind === "damage") { exact = true; meter(event.kl, true); }
  else if (!a) return;
  else if (event.kind === "curve") event.points.forEach(([c, kl]) => a.curve.set(c, kl));
  else if (event.kind === "budget") {
    a.poles[event.pole] = event;
    if (a.toBudget && event.pole > 0) {
      a.toBudget = false;
      say(event.met ? `${a.label} stands at its budget.` : `${a.label}, budget of ${show(budget())} nats: ${inWords(event)}.`);
      if (event.met) set(a, rounded(event.c));
    }
  } else if (event.kind === "effect") {
    a.effect = { c: event.c, value: event.effect };
    meter(damage, true);
  }
  if (a) refresh(a);
}

const soon = later(300, measure);

// ---- names and files -------------------------------------------------------------------------------

function files(a) {
  const format = element("select", {}, ...[["lora-lite", "lora-lite file"], ["peft", "PEFT folder (zip)"], ["gguf-control-vector", "GGUF control vector"], ["gguf", "GGUF LoRA"]].map(([value, text]) => new Option(text, value)));
  const rank = element("input", { type: "number", min: 1, max: 1024, step: 1, placeholder: "none" });
  const name = element("input", { type: "text", value: a.label, maxLength: 40 });
  const button = (text, work) => {
    const node = element("button", { type: "button", className: "small", textContent: text });
    node.addEventListener("click", async () => { complain(""); try { await work(); } catch (error) { failed(error); } });
    return node;
  };
  const save = button("Save", async () => {
    const response = await download("/api/save", { adapter: a.id, c: a.c, format: format.value, rank: Number.isFinite(rank.valueAsNumber) ? rank.valueAsNumber : null });
    const file = /filename="([^"]+)"/.exec(response.headers.get("content-disposition"))[1];
    const link = element("a", { href: URL.createObjectURL(await response.blob()), download: file });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    say(`Saved ${file}, at c = ${show(a.c)}.`);
  });
  const rename = button("Rename", async () => { list((await ask("/api/rename", { adapter: a.id, label: name.value })).adapters); say(`Renamed to ${adapters.get(a.id).label}.`); $("h-adapters").focus(); });
  const remove = button("Remove", async () => { list((await ask("/api/remove", { adapter: a.id })).adapters); say(`Removed ${a.label}.`); $("h-adapters").focus(); moved(); });
  return element("details", {}, element("summary", { textContent: "Save, rename, remove" }),
    element("div", { className: "fields" }, element("label", {}, "Format ", format), element("label", {}, "As a LoRA of rank ", rank)),
    element("div", { className: "actions" }, save),
    element("div", { className: "fields" }, element("label", {}, "Name ", name)),
    element("div", { className: "actions" }, rename, remove));
}
