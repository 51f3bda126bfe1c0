// Small things that every part of the page uses.
const data = JSON.parse(document.getElementById("data").textContent);

const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
};
const draw = (tag, attributes = {}, ...children) => {
  const node = document.createElementNS("http:" + "//www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const percent = (value, digits = 1) => (100 * value).toFixed(digits).replace("-", "\u2212");
const signed = value => (value >= 0 ? "+" : "") + percent(value);
const short = value => value === null ? "" : value >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));

// the budget and the series under the pointer are shared by all parts of a panel
class Panel {
  constructor(root, content) {
    Object.assign(this, content);
    this.root = root;
    this.budget = content.first;
    this.watchers = { budget: [], focus: [] };
    this.looks = Object.fromEntries(content.series.map(series => [series.name, series]));
  }
  on(event, act) { this.watchers[event].push(act); }
  choose(budget) { this.budget = budget; this.watchers.budget.forEach(act => act(budget)); }
  focus(series) { this.watchers.focus.forEach(act => act(series)); }
  at(budget) { return this.points.filter(point => point.budget === budget || point.budget === ""); }
  find(selector) { return this.root.querySelector(selector); }
  colour(series) { const look = this.looks[series]; return look ? look[document.documentElement.dataset.theme === "dark" ? "dark" : "light"] : "gray"; }
}
