"use strict";
// One page, no library. A column asks for itself, and an answer that comes after a newer question of its column is dropped.
const $ = (selector, root = document) => root.querySelector(selector);
const make = (tag, given = {}, ...inner) => {
  const element = Object.assign(document.createElement(tag), given);
  element.append(...inner);
  return element;
};
const OTHER = "write one…";
const state = { facts: null, picture: null, sample: null, visual: 0, columns: [], looked: 0 };

async function call(path, given, signal) {
  const raw = given instanceof Blob;
  let response;
  try {
    response = await fetch(path, given === undefined ? { signal } : {
      method: "POST", signal, body: raw ? given : JSON.stringify(given),
      headers: { "X-Tokenprune": "page", "Content-Type": raw ? "application/octet-stream" : "application/json" },
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is `tokenprune ui` still running in its terminal?");
  }
  const said = await response.json().catch(() => ({ error: `The server answered with status ${response.status}.` }));
  if (!response.ok) throw new Error(said.error);
  return said;
}

function trouble(text) {
  $(".trouble").hidden = !text;
  $(".trouble").textContent = text || "";
}

// --- the budget: the slider is logarithmic, because 64 or 128 of 576 tokens matters and 500 or 564 does not

const keep = () => Math.max(1, Math.round(Math.exp($(".slide").value / 1000 * Math.log(Math.max(2, state.visual)))));
function slideTo(tokens) {
  $(".slide").value = Math.round(1000 * Math.log(Math.max(1, tokens)) / Math.log(Math.max(2, state.visual)));
}
function showBudget() {
  const kept = Math.min(keep(), state.visual);
  $(".tokens").textContent = `${kept} of ${state.visual} (${percent(kept / state.visual)})`;
  $(".slide").setAttribute("aria-valuetext", `${kept} of ${state.visual} visual tokens`);
  for (const button of document.querySelectorAll(".quick button"))
    button.setAttribute("aria-pressed", String(Number(button.dataset.keep) === kept));
}
function quickBudgets() {
  const ninths = [1, 2, 3].map(part => Math.max(1, Math.round(state.visual * part / 9)));
  $(".quick").replaceChildren(...ninths.map(tokens => make("button", {
    type: "button", textContent: tokens, title: "the budgets of most papers: a ninth, two, three",
    onclick: () => { slideTo(tokens); showBudget(); askAll(true); },
  })));
  ninths.forEach((tokens, place) => { $(".quick").children[place].dataset.keep = tokens; });
}

// --- numbers

const percent = share => `${share < .0995 && share > 0 ? (100 * share).toFixed(1) : Math.round(100 * share)} %`;
function short(value, unit) {
  for (const prefix of ["", "k", "M", "G", "T"]) {
    if (value < 1000 || prefix === "T") return `${Number(value.toPrecision(3))} ${prefix}${unit}`;
    value /= 1000;
  }
}
const time = seconds => seconds >= 1 ? `${seconds.toFixed(2)} s` : `${Math.round(seconds * 1000)} ms`;
const ROWS = [
  ["tokens", one => one.average, one => one.average === one.kept ? String(one.kept)
    : `${one.kept}, ${one.average.toFixed(0)} mean of layers`],
  ["FLOPs", one => one.flops, one => short(one.flops, "")],
  ["KV cache", one => one.kv, one => short(one.kv, "B")],
  ["first token", one => one.firstToken, one => time(one.firstToken)],
  ["answer", one => one.seconds, one => time(one.seconds)],
];

// --- columns

class Column {
  constructor(method) {
    this.fixed = method === "none";
    this.turn = null;
    this.box = make("article", { className: "block column" });
    this.select = make("select", { ariaLabel: "method", onchange: () => this.picked() });
    this.own = make("input", {
      type: "text", className: "own", hidden: true, placeholder: "vtc_cls@64+var(p=0.4)", ariaLabel: "a method, written out",
      onchange: () => this.ask(),
    });
    const pick = make("div", { className: "pick" });
    if (this.fixed) pick.append(make("b", { className: "who", textContent: "unpruned" }));
    else pick.append(this.select, this.own);
    this.what = make("p", { className: "what" });
    this.image = make("img", { alt: "what is kept of the picture" });
    this.said = make("div", { className: "said", ariaLive: "polite" });
    this.table = make("table");
    this.remarks = make("p", { className: "remarks" });
    this.problem = make("p", { className: "problem", role: "alert" });
    this.box.append(pick, this.what, this.problem,
      make("div", { className: "result" }, this.image, this.said, this.table, this.remarks));
    if (this.fixed) return;
    const option = one => make("option", { value: one.name, textContent: one.name });
    this.select.append(
      make("option", { value: "", textContent: "—" }),
      make("optgroup", { label: "drop or merge tokens" }, ...state.facts.methods.map(option)),
      make("optgroup", { label: "change attention" }, ...state.facts.interventions.map(option)),
      make("option", { value: OTHER, textContent: OTHER }),
    );
    this.select.value = method;
  }
  get method() {
    return this.fixed ? "none" : this.select.value === OTHER ? this.own.value.trim() : this.select.value;
  }
  picked() {
    this.own.hidden = this.select.value !== OTHER;
    if (!this.own.hidden) this.own.focus();
    this.ask();
  }
  describe() {
    const known = [...state.facts.methods, ...state.facts.interventions].find(one => one.name === this.method);
    this.what.textContent = this.fixed ? "The model as it is: every visual token of the picture." : known ? known.says : "";
    this.what.title = this.what.textContent;
  }
  async ask() {
    this.turn?.abort();
    this.turn = null;
    this.describe();
    this.problem.textContent = "";
    const question = $(".ask").value.trim();
    if (!this.method || !state.picture || !state.visual || !question) {
      this.clear();
      return;
    }
    const turn = this.turn = new AbortController();
    this.box.classList.add("waiting");
    try {
      const given = { picture: state.picture, question, method: this.method, keep: Math.min(keep(), state.visual) };
      const one = await call("/answer", given, turn.signal);
      if (this.turn === turn) this.show(one);
    } catch (error) {
      if (this.turn !== turn || error.name === "AbortError") return;
      this.clear();
      this.problem.textContent = error.message;
    }
    if (this.turn === turn) this.box.classList.remove("waiting");
  }
  clear() {
    this.box.classList.remove("waiting");
    this.image.removeAttribute("src");
    this.said.textContent = this.remarks.textContent = "";
    this.said.className = "said";
    this.table.replaceChildren();
    this.last = null;
  }
  show(one) {
    this.last = one;
    this.image.src = one.picture;
    this.said.textContent = one.answer || "(nothing)";
    this.said.className = `said ${one.right === null ? "" : one.right ? "right" : "wrong"}`;
    this.remarks.textContent = one.notes.join(" ");
    if (this.fixed) state.columns.forEach(column => column.last && column.tabulate());
    else this.tabulate();
  }
  tabulate() {
    const whole = state.columns[0].last, one = this.last;
    this.table.replaceChildren(make("tbody", {}, ...ROWS.map(([title, value, written]) => {
      const cell = make("td");
      if (value(one) === null) cell.textContent = "not modelled";
      else cell.textContent = written(one);
      if (whole && value(one) !== null && value(whole)) {
        const share = value(one) / value(whole), bar = make("i");
        bar.style.width = `${Math.min(100, 100 * share)}%`;
        if (!this.fixed) cell.append(make("small", { textContent: percent(share) }));
        cell.append(make("div", { className: "share" }, bar));
      }
      return make("tr", {}, make("td", { textContent: title }), cell);
    })));
  }
}

function askAll(prunedOnly = false) {
  for (const column of state.columns) if (!(prunedOnly && column.fixed)) column.ask();
}

// --- pictures

async function choose(picture, sample, notes, source) {
  const turn = ++state.looked;
  Object.assign(state, { picture, sample, visual: 0 });
  state.columns.forEach(column => { column.turn?.abort(); column.clear(); });
  $(".chosen").hidden = false;
  $(".chosen").src = source;
  $(".hint").textContent = "drop or press for another";
  for (const button of document.querySelectorAll(".gallery button"))
    button.setAttribute("aria-pressed", String(button.dataset.id === picture));
  if (sample) $(".ask").value = sample.question;
  else if (!$(".ask").value.trim()) $(".ask").value = "what is in this picture?";
  $(".notes").replaceChildren(...notes.map(text => make("div", { className: "note", textContent: text })));
  expected();
  try {
    const seen = await call("/look", { picture });
    if (turn !== state.looked) return;
    const first = !state.slid;
    state.visual = seen.visual;
    state.slid = true;
    quickBudgets();
    if (first) slideTo(Math.round(state.visual / 9));
    showBudget();
    trouble("");
    askAll();
  } catch (error) {
    if (turn === state.looked) trouble(error.message);
  }
}

function expected() {
  const asked = state.sample && $(".ask").value.trim() === state.sample.question;
  const frames = state.sample?.frames > 1 ? ` It is a video of ${state.sample.frames} frames.` : "";
  $(".expected").textContent = asked ? `The suite's answer: ${state.sample.answer}.${frames}` : frames.trim();
}

async function own(file) {
  if (!file) return;
  try {
    const held = await call("/picture", file);
    const seen = URL.createObjectURL(file);
    await choose(held.id, null, held.notes, seen);
  } catch (error) {
    trouble(error.message);
  }
}

async function begin() {
  const saved = localStorage.getItem("theme");
  const dark = saved ? saved === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $(".theme").onclick = () => {
    const root = document.documentElement;
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
  };
  const drop = $(".drop"), file = $(".file");
  drop.onclick = () => file.click();
  file.onchange = () => { own(file.files[0]); file.value = ""; };
  for (const name of ["dragover", "dragleave", "drop"]) document.addEventListener(name, event => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop") own(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", event => {
    const pasted = [...event.clipboardData.files][0];
    if (pasted) own(pasted);
  });
  let pause = 0;
  $(".slide").oninput = () => {
    showBudget();
    clearTimeout(pause);
    pause = setTimeout(() => askAll(true), 150);
  };
  $(".ask").onchange = () => { expected(); askAll(); };
  try {
    state.facts = await call("/facts");
  } catch (error) {
    return trouble(error.message);
  }
  $(".model").textContent = state.facts.model;
  state.columns = ["none", ...state.facts.start].map(method => new Column(method));
  $(".columns").replaceChildren(...state.columns.map(column => column.box));
  $(".gallery").replaceChildren(...state.facts.samples.map(sample => {
    const place = sample.id.split(":")[1];
    const button = make("button", {
      type: "button", title: `${sample.question} (${sample.answer})`,
      onclick: () => choose(sample.id, sample, [], `/samples/${place}.png`),
    }, make("img", { src: `/samples/${place}.png`, alt: sample.question }), make("small", { textContent: sample.family }));
    button.dataset.id = sample.id;
    return button;
  }));
  const first = state.facts.samples[0];
  await choose(first.id, first, [], `/samples/${first.id.split(":")[1]}.png`);
}

begin();
