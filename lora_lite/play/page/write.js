// The columns: text as it streams, each token with its divergence, and where along the text the adapters act.

import { $, Latest, complain, element, events, level, say, show } from "/base.js";
import { scales } from "/adapters.js";

const writing = new Latest();
const NAMES = { stop: "ended by itself", length: "cut at the limit", overflow: "overflowed: the scale is too large" };
export let written = false;

export function options() {
  return {
    prompt: $("prompt").value, seed: $("seed").valueAsNumber, temperature: $("temperature").valueAsNumber,
    tokens: $("tokens").valueAsNumber,
  };
}

export const stop = () => writing.stop();

function token(text, kl) {
  const span = element("span", { textContent: text });
  if (kl !== undefined) {
    span.className = `k k${level(kl)}`;
    span.title = `KL ${show(kl)} nats`;
  }
  return span;
}

/** `live`: after a slider, which takes no other error away. */
export function write(live = false) {
  if (!live) complain("");
  const system = $("system-details").open ? $("system").value : "";
  $("a-system").hidden = !system.trim();
  written = true;
  const started = performance.now();
  return writing.run(async (signal) => {
    say("Writing…");
    const bars = [];
    let first = true, ended = false;
    try {
      for await (const event of events("/api/write", { ...options(), scales: scales(), system }, signal)) {
        if (event.kind === "prompt") {
          for (const key of ["base", "adapted", "system"]) { $(`t-${key}`).replaceChildren(); }
          event.columns[0].tokens.forEach(([text, kl]) => bars.push([text, kl, "prompt"]));
          draw(bars);
        } else if (event.kind === "note") {
          say(event.text);
        } else if (event.kind === "tokens") {
          if (first) document.body.dataset.first = Math.round(performance.now() - started);
          first = false;
          for (const [key, text, kl] of event.tokens) {
            $(`t-${key}`).append(key === "adapted" ? token(text, kl) : text);
            if (key === "adapted") { bars.push([text, kl, "answer"]); grow(bars); }
          }
        } else if (event.kind === "end") {
          ended = true;
          table(bars);
          finish(event);
        }
      }
    } finally {
      if (bars.length && !ended) table(bars); // also of a text that was stopped
    }
  });
}

function finish(event) {
  for (const [key, column] of Object.entries(event.columns)) {
    const note = column.why === "stop" ? "" : ` [${NAMES[column.why]}]`;
    if (note) $(`t-${key}`).append(element("span", { className: "end", textContent: note }));
  }
  const mean = event.columns.adapted.mean;
  say(`Done: ${event.columns.adapted.tokens} tokens in ${event.seconds.toFixed(1)} s, KL ${show(mean ?? 0)} nats a token on this text.`);
}

// ---- the strip -------------------------------------------------------------------------------------

const height = (kl) => `${Math.min(100, 100 * Math.sqrt((kl ?? 4) / 4)).toFixed(0)}%`;

function bar([text, kl, part]) {
  const node = element("i", { className: part, title: `${JSON.stringify(text)}: KL ${show(kl)}` });
  node.style.setProperty("--h", height(kl));
  return node;
}

function draw(bars) {
  $("where").hidden = false;
  $("kl-table").tBodies[0].replaceChildren();
  $("strip").replaceChildren(...bars.map(bar), element("b"));
  describe(bars);
}

function grow(bars) { $("strip").append(bar(bars.at(-1))); }

function describe(bars) {
  const most = bars.reduce((best, row) => ((row[1] ?? 99) > (best[1] ?? 99) ? row : best), bars[0]);
  $("strip-text").textContent = `Bars: KL at each token, the prompt’s first, then the answer’s after the dashed line. Most at ${JSON.stringify(most[0])}, ${show(most[1])} nats.`;
}

function table(bars) {
  describe(bars);
  $("kl-table").tBodies[0].replaceChildren(...bars.map(([text, kl, part]) => element("tr", {},
    element("td", { className: "token", textContent: text.replaceAll("\n", "↵") || "(end)" }), element("td", { textContent: part }),
    element("td", { textContent: show(kl) }))));
}

// ---- the sweep -------------------------------------------------------------------------------------

const sweeping = new Latest();

export function sweep() {
  complain("");
  const [from, to, steps] = ["from", "to", "steps"].map((name) => $(`sweep-${name}`).valueAsNumber);
  const cs = Array.from({ length: steps }, (_, i) => Number((from + ((to - from) * i) / (steps - 1)).toFixed(4)));
  const texts = [];
  return sweeping.run(async (signal) => {
    say("Sweeping…");
    const body = { ...options(), scales: scales(), adapter: $("sweep-adapter").value, cs };
    for await (const event of events("/api/sweep", body, signal)) {
      if (event.kind === "prompt") {
        $("sweep-rows").replaceChildren(...cs.map((c, i) => {
          texts[i] = { figures: element("p", { className: "figures", textContent: `c = ${show(c)}` }), text: element("p", { className: "text" }) };
          return element("li", {}, texts[i].figures, texts[i].text);
        }));
      } else if (event.kind === "note") {
        say(event.text);
      } else if (event.kind === "tokens") {
        event.tokens.forEach(([key, text, kl]) => texts[key].text.append(token(text, kl)));
      } else if (event.kind === "end") {
        Object.entries(event.columns).forEach(([key, column]) => {
          texts[key].figures.textContent = `c = ${show(cs[key])}, KL ${show(column.mean ?? (column.why === "overflow" ? null : 0))} nats a token`;
        });
        say(`Done: ${cs.length} scales in ${event.seconds.toFixed(1)} s.`);
      }
    }
  });
}

export const stopSweep = () => sweeping.stop();
