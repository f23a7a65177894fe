// What every part of the page uses: elements, numbers in words, errors, and requests to the server.

export const $ = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** A number for people: three digits, with a real minus. */
export function show(value, signed = false) {
  if (value === null || value === undefined) return "too large to measure";
  const text = Math.abs(value) >= 100 ? value.toFixed(0) : Number(value.toPrecision(3)).toString();
  return (signed && value > 0 ? "+" : "") + (Math.abs(value) < 0.0005 ? "0" : text).replace("-", "−");
}

export const nats = (value) => show(value) + (value === null ? "" : " nats");

/** The level of a divergence, as in the legend. */
export const level = (kl) => (kl === null ? 4 : [0.05, 0.2, 0.7, 2].filter((edge) => kl >= edge).length);

export function say(text) { $("status").textContent = text; }

let source = null; // the requests that the error on the page is of

export function complain(text) {
  source = null;
  const box = $("problem");
  box.replaceChildren();
  box.hidden = !text;
  if (!text) return;
  const close = element("button", { type: "button", className: "small", textContent: "Dismiss" });
  close.addEventListener("click", () => complain(""));
  box.append(element("p", { textContent: text.split("\n").map((line) => line.trim()).join(". ") }), close);
}

/** An error as a sentence. Whoever keeps a list of the server's looks if it still holds. */
export function failed(error) {
  complain(error.message);
  document.dispatchEvent(new Event("failed"));
}

const LOST = "The server doesn’t answer. It was stopped, or this machine slept: start it again in its terminal, then load this page again.";

async function request(path, body, signal) {
  let response;
  try {
    response = await fetch(path, body === undefined ? { signal } : {
      method: "POST", signal, headers: { "content-type": "application/json" }, body: JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(LOST);
  }
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}

export const ask = async (path, body) => (await request(path, body)).json();
export const download = async (path, body) => request(path, body);

/** The events of a request, one at a time. An "error" among them is thrown. */
export async function* events(path, body, signal) {
  const response = await request(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error(LOST);
    }
    if (part.done) return;
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.kind === "error") throw new Error(event.text);
      yield event;
    }
  }
}

/** Requests of one kind: a new one ends the last and takes its error away. `run(async (signal) => …)` shows what goes wrong
    as a sentence. */
export class Latest {
  run(work) {
    this.stop();
    if (source === this) complain("");
    const control = (this.control = new AbortController());
    const done = (async () => {
      try {
        await work(control.signal);
      } catch (error) {
        if (error.name !== "AbortError") { failed(error); source = this; }
      } finally {
        if (this.control === control) this.control = null;
      }
    })();
    return done;
  }
  get busy() { return Boolean(this.control); }
  stop() {
    this.control?.abort();
    this.control = null;
  }
}

/** `work`, so long after the last call; `cancel` forgets a call. */
export function later(milliseconds, work) {
  let timer;
  const cancel = () => clearTimeout(timer);
  return Object.assign(() => { cancel(); timer = setTimeout(work, milliseconds); }, { cancel });
}
