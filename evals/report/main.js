// Puts the parts together: panels, the bar on top, light and dark.
const sections = [...document.querySelectorAll("section.panel")];
const panels = sections.map((root, index) => new Panel(root, data.panels[index]));
const dark = matchMedia("(prefers-color-scheme: dark)");
const setTheme = name => { document.documentElement.dataset.theme = name; };
setTheme(dark.matches ? "dark" : "light");

const colours = panel => {
  panel.root.querySelectorAll("[data-series]").forEach(node => node.style.setProperty("--c", panel.colour(node.dataset.series)));
  panel.root.querySelectorAll(".leaderboard tbody tr").forEach(row => row.querySelector(".whisker").style.setProperty("--c", row.querySelector(".dot").style.getPropertyValue("--c")));
};
const repaint = () => panels.forEach(panel => { colours(panel); panel.repaint(); panel.repaintFamilies(); panel.repaintSamples?.(); });

let shown = 0;
const budgetBox = document.querySelector(".topbar .budgets"), tabs = document.querySelector(".topbar .tabs");
const showBudgets = () => {
  const panel = panels[shown];
  document.querySelector(".topbar .budget").hidden = panel.budgets.length < 2;
  budgetBox.replaceChildren(...panel.budgets.map(({ keep, title }) => make("button", { type: "button", "data-keep": keep, title, "aria-pressed": keep === panel.budget, onclick: () => panel.choose(keep) }, keep)));
};
const showPanel = index => {
  shown = index;
  sections.forEach((section, place) => { section.hidden = place !== index; });
  [...tabs.children].forEach((tab, place) => tab.setAttribute("aria-pressed", place === index));
  showBudgets();
};
if (panels.length > 1) {
  tabs.append(...panels.map((panel, index) => make("button", { type: "button", onclick: () => showPanel(index) }, panel.name)));
  sections.forEach(section => { section.querySelector(".panel-title").hidden = true; });
}
for (const panel of panels) {
  const mark = () => {
    const title = panel.budgets.find(each => each.keep === panel.budget)?.title;
    panel.root.querySelectorAll(".at-budget").forEach(node => { node.textContent = title ? "at " + title : ""; });
    panel.root.querySelectorAll(".card").forEach(card => card.classList.toggle("on", panel.budgets.length > 1 && card.dataset.budget === panel.budget));
    if (panels[shown] === panel) showBudgets();
  };
  panel.root.querySelectorAll("table.sort").forEach(sortable);
  leaderboard(panel);
  aboutOf(panel);
  plotOf(panel);
  familiesOf(panel);
  agreementOf(panel);
  explorerOf(panel);
  panel.on("budget", mark);
  panel.root.querySelectorAll(".card").forEach(card => card.addEventListener("click", () => panel.choose(card.dataset.budget)));
  colours(panel);
  mark();
}
document.querySelectorAll(".links a").forEach(link => link.addEventListener("click", () => document.getElementById(`${link.dataset.to}-${shown}`).scrollIntoView({ behavior: "smooth" })));
document.querySelector(".theme").addEventListener("click", () => { setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"); repaint(); });
dark.addEventListener("change", () => { setTheme(dark.matches ? "dark" : "light"); repaint(); });
showPanel(0);
restoreState();
// after whoever handles the event itself
for (const event of ["click", "change", "input"]) document.addEventListener(event, () => setTimeout(writeState, 0));
addEventListener("hashchange", restoreState);
