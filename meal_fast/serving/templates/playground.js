// The playground. What models and people write is only ever put in as text.
"use strict";

const at = (id) => document.getElementById(id);
const round = (x) => Math.round(x * 1000) / 1000;
let run = null; // what /v1/models says of it
let w = []; // the preference that is set, one number an objective
let going = null; // an AbortController while answers come
let shown = ""; // "one" or "five": what was asked last
let ranges = []; // of each objective the lowest and the highest reward so far
let columns = [];

function made(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

function drawn(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function notice(text, bad) {
  at("notice").textContent = text;
  at("notice").classList.toggle("bad", Boolean(bad));
  at("notice").hidden = !text;
}

// --- the server -------------------------------------------------------------------------------

async function call(path, body, signal) {
  const headers = {};
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = "Bearer " + token;
  if (body) headers["Content-Type"] = "application/json";
  const method = body ? "POST" : "GET";
  const text = body && JSON.stringify(body);
  const answer = await fetch(path, { method, headers, body: text, signal });
  if (answer.ok) return answer;
  let reason = answer.status + " " + answer.statusText;
  try {
    reason = (await answer.json()).error.message;
  } catch {
    // not one of ours: the status says it
  }
  at("door").hidden = answer.status !== 401;
  throw new Error(reason);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// --- the preference ---------------------------------------------------------------------------

const named = (values) => Object.fromEntries(run.objectives.map((name, k) => [name, values[k]]));
const said = (values) => run.objectives.map((name, k) => `${name} ${round(values[k])}`).join(" · ");

const fine = (x) => Math.round(x * 1e4) / 1e4;

function normalised(values) {
  const kept = values.map((x) => Math.max(x, 0));
  const sum = kept.reduce((a, b) => a + b, 0);
  const shares = sum ? kept.map((x) => fine(x / sum)) : kept.map(() => fine(1 / kept.length));
  // Rounded shares must still sum to 1: the largest takes what is left.
  const largest = shares.indexOf(Math.max(...shares));
  shares[largest] = 1 - shares.reduce((a, x, k) => (k === largest ? a : a + x), 0);
  shares[largest] = fine(shares[largest]);
  return shares;
}

let knob = () => {}; // shows w

function set(values, released) {
  w = normalised(values);
  knob();
  at("w").textContent = said(w);
  remember();
  if (released && shown === "one" && at("prompt").value.trim()) ask("one");
}

function range(label) {
  const input = made("input");
  Object.assign(input, { type: "range", min: 0, max: 1, step: 0.01 });
  input.setAttribute("aria-label", label);
  return input;
}

function slider(place) {
  const [left, right] = run.objectives;
  const input = range(`share of ${right}`);
  input.id = "slider";
  const ends = made("div", "ends");
  ends.append(made("span", "", left), made("span", "", right));
  input.addEventListener("input", () => set([1 - input.value, Number(input.value)]));
  input.addEventListener("change", () => set([1 - input.value, Number(input.value)], true));
  place.append(ends, input);
  knob = () => {
    input.value = w[1];
  };
}

function triangle(place) {
  const corners = [[30, 172], [210, 172], [120, 16]];
  const svg = drawn("svg", { viewBox: "0 0 240 196", class: "triangle", tabindex: 0 });
  svg.setAttribute("role", "application");
  const dot = drawn("circle", { r: 8 });
  svg.append(drawn("polygon", { points: corners.map((c) => c.join()).join(" ") }));
  corners.forEach(([x, y], k) => {
    const above = k === 2;
    const place = { x, y: above ? y - 5 : y + 16, "text-anchor": "middle" };
    svg.append(drawn("text", place, run.objectives[k]));
  });
  svg.append(dot);
  const move = (event, released) => {
    const point = new DOMPoint(event.clientX, event.clientY);
    const { x, y } = point.matrixTransform(svg.getScreenCTM().inverse());
    const top = (172 - y) / 156;
    const right = (x - 30 - 90 * top) / 180;
    set([1 - top - right, right, top], released);
  };
  svg.addEventListener("pointerdown", (event) => {
    svg.setPointerCapture(event.pointerId);
    move(event);
  });
  svg.addEventListener("pointermove", (event) => event.buttons && move(event));
  svg.addEventListener("pointerup", (event) => move(event, true));
  const steps = {
    ArrowLeft: [0.05, -0.05, 0],
    ArrowRight: [-0.05, 0.05, 0],
    ArrowUp: [-0.025, -0.025, 0.05],
    ArrowDown: [0.025, 0.025, -0.05],
  };
  svg.addEventListener("keydown", (event) => {
    if (!steps[event.key]) return;
    event.preventDefault();
    set(w.map((x, k) => x + steps[event.key][k]));
  });
  place.append(svg);
  knob = () => {
    dot.setAttribute("cx", corners.reduce((a, c, k) => a + w[k] * c[0], 0));
    dot.setAttribute("cy", corners.reduce((a, c, k) => a + w[k] * c[1], 0));
    svg.setAttribute("aria-label", "Preference: " + said(w) + "; arrow keys move it");
  };
}

function sliders(place) {
  const grid = made("div", "slide");
  const inputs = run.objectives.map((name) => {
    const input = range(name);
    grid.append(made("span", "", name), input);
    return input;
  });
  const read = () => inputs.map((input) => Number(input.value));
  for (const input of inputs) {
    input.addEventListener("input", () => {
      at("w").textContent = said(normalised(read()));
    });
    input.addEventListener("change", () => set(read(), true));
  }
  place.append(grid);
  knob = () => inputs.forEach((input, k) => (input.value = w[k]));
}

function five() {
  const k = run.objectives.length;
  if (k === 2) return [1, 0.75, 0.5, 0.25, 0].map((x) => [x, 1 - x]);
  const corner = (i) => run.objectives.map((_, j) => Number(i === j));
  const all = run.objectives.map((_, i) => corner(i)).slice(0, 3);
  return [...all, normalised(run.objectives.map(() => 1)), w].slice(0, 5);
}

// --- answers ----------------------------------------------------------------------------------

function column(title, base) {
  const article = made("article", base ? "base busy" : "busy");
  const head = made("h2", "", title);
  const mix = made("div", "mix");
  const text = made("p", "text");
  const end = made("p", "end");
  const bars = made("div", "bars");
  article.append(head, mix, text, end, bars);
  at("answers").append(article);
  return {
    article, text, end, bars, values: null,
    told(values) {
      head.textContent = said(values);
      mix.replaceChildren(...values.map((x, k) => {
        const part = made("i", "k" + (k % 6));
        part.style.width = 100 * x + "%";
        return part;
      }));
    },
  };
}

function drawBars() {
  for (const { bars, values } of columns) {
    if (!values) continue;
    bars.replaceChildren(...values.map((value, k) => {
      if (value === null) return made("div", "bar", run.objectives[k] + ": does not apply");
      const [low, high] = ranges[k];
      const bar = made("div", "bar");
      const track = made("div", "track");
      const fill = made("i", "k" + (k % 6));
      fill.style.width = (high > low ? 100 * (value - low) / (high - low) : 50) + "%";
      track.append(fill);
      const name = made("span", "", run.objectives[k]);
      name.title = `reward of ${run.objectives[k]}, shown from ${round(low)} to ${round(high)}`;
      bar.append(name, track, made("b", "", (value < 0 ? "" : "+") + value.toFixed(2)));
      return bar;
    }));
  }
}

async function score(prompt, one) {
  try {
    const answer = await call("v1/rewards", { prompt, answers: [one.text.textContent] });
    const [row] = (await answer.json()).rewards;
    one.values = run.objectives.map((name) => row[name]);
    one.values.forEach((value, k) => {
      if (value === null) return;  // it does not apply
      const [low, high] = ranges[k] || [value, value];
      ranges[k] = [Math.min(low, value), Math.max(high, value)];
    });
    drawBars();
  } catch (error) {
    at("rewards-note").textContent = "No rewards: " + error.message;
    at("rewards-note").hidden = false;
  }
}

async function fill(body, places, signal) {
  const answer = await call("v1/chat/completions", body, signal);
  for await (const event of events(answer)) {
    if (event.error) throw new Error(event.error.message);
    for (const choice of event.choices) {
      const one = places[choice.index];
      if (choice.preference) one.told(run.objectives.map((name) => choice.preference[name]));
      if (choice.delta.content) one.text.append(choice.delta.content);
      if (choice.finish_reason) {
        one.article.classList.remove("busy");
        const cut = choice.finish_reason === "length";
        one.end.textContent = cut ? "[…] cut at the longest answer" : "";
        score(body.messages[0].content, one);
      }
    }
  }
}

async function ask(what) {
  going?.abort();
  const mine = (going = new AbortController());
  shown = what;
  notice("");
  at("rewards-note").hidden = true;
  at("stop").hidden = false;
  at("answers").replaceChildren();
  at("answers").className = what;
  const body = {
    messages: [{ role: "user", content: at("prompt").value.trim() }],
    stream: true,
    temperature: Number(at("temperature").value),
    max_tokens: Number(at("length").value),
  };
  if (at("seed").value !== "") body.seed = Number(at("seed").value);
  const auto = at("auto").checked && what === "one";
  const weights = what === "five" ? five() : [w];
  const places = weights.map((values) => {
    const one = column(auto ? "auto" : said(values));
    if (!auto) one.told(values);
    return one;
  });
  const preferences = auto ? ["auto"] : weights.map(named);
  const calls = [fill({ ...body, preferences }, places, mine.signal)];
  columns = places;
  if (at("base").checked) {
    const beside = column("the untrained model", true);
    columns = [...places, beside];
    calls.push(fill({ ...body, model: "base" }, [beside], mine.signal));
  }
  const ended = await Promise.allSettled(calls);
  const failed = ended.find((e) => e.status === "rejected" && e.reason.name !== "AbortError");
  for (const one of columns) if (going === mine) one.article.classList.remove("busy");
  if (failed) notice(failed.reason.message, true);
  if (going === mine) {
    going = null;
    at("stop").hidden = true;
  }
}

// --- the state in the address -----------------------------------------------------------------

const FIELDS = { prompt: "p", temperature: "t", length: "n", seed: "s" };
const TICKS = { base: "base", auto: "auto" };

function remember() {
  const state = new URLSearchParams();
  for (const [id, key] of Object.entries(FIELDS)) if (at(id).value) state.set(key, at(id).value);
  for (const [id, key] of Object.entries(TICKS)) if (at(id).checked) state.set(key, "1");
  state.set("w", w.join());
  history.replaceState(null, "", "#" + state);
}

function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  for (const [id, key] of Object.entries(FIELDS)) if (state.has(key)) at(id).value = state.get(key);
  for (const [id, key] of Object.entries(TICKS)) at(id).checked = state.get(key) === "1";
  const values = (state.get("w") || "").split(",").map(Number);
  const good = values.length === run.objectives.length && values.every((x) => x >= 0 && x <= 1);
  set(good ? values : run.objectives.map(() => 1));
  at("knob").classList.toggle("off", at("auto").checked);
}

async function begin() {
  const models = (await (await call("v1/models")).json()).data;
  at("door").hidden = true;
  notice("");
  run = models[0].meal_fast;
  ranges = run.rewards.map((ends) => [...ends]);
  at("run").textContent = models[0].id;
  document.title = models[0].id + " · meal-fast";
  at("about").textContent = "One model, steered between " + run.objectives.join(", ") + ".";
  at("state").textContent = `This run is not finished: ${run.unfinished}.`;
  at("state").hidden = !run.unfinished;
  at("temperature").value = run.temperature;
  at("length").value = run.max_tokens;
  at("seed").value = 0;
  at("auto-row").hidden = !run.auto;
  at("knob").replaceChildren();
  [, , slider, triangle][run.objectives.length]?.(at("knob"));
  if (run.objectives.length > 3) sliders(at("knob"));
  recall();
}

function start() {
  // A token is not part of what a link shares.
  const state = new URLSearchParams(location.hash.slice(1));
  if (state.has("token")) {
    sessionStorage.setItem("token", state.get("token"));
    state.delete("token");
    history.replaceState(null, "", "#" + state);
  }
  begin().catch((error) => notice(error.message, true));
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (run && at("prompt").value.trim()) ask("one");
});
at("compare").addEventListener("click", () => {
  if (run && at("ask").reportValidity()) ask("five");
});
at("stop").addEventListener("click", () => going?.abort());
at("door").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", at("token").value);
  start();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
});
for (const id of [...Object.keys(FIELDS), ...Object.keys(TICKS)]) {
  at(id).addEventListener("input", () => {
    at("knob").classList.toggle("off", at("auto").checked);
    if (run) remember();
  });
}
addEventListener("hashchange", () => run && recall());
start();
