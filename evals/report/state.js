// What is chosen stands in the address, so that a link shows what its sender saw.
const readState = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
const writeState = () => {
  const panel = panels[shown], state = new URLSearchParams();
  const put = (name, value, usual) => { if (value !== usual && value !== null && value !== undefined) state.set(name, value); };
  put("panel", String(shown), "0");
  put("budget", panel.budget, panel.first);
  put("cost", panel.find(".axis").value, panel.usualAxis);
  put("columns", panel.find('.groups [aria-pressed="true"]').dataset.group, "g-acc");
  put("find", panel.find(".find").value, "");
  put("only", panel.find(".only").checked ? "1" : "", "");
  put("hide", panel.series.map(series => series.name).filter(name => panel.hidden.has(name)).join("|"), "");
  const text = state.toString();
  history.replaceState(null, "", text ? "#" + text : location.pathname + location.search);
};
const restoreState = () => {
  const state = readState();
  const index = Number(state.panel ?? 0);
  if (Number.isInteger(index) && panels[index]) showPanel(index);
  const panel = panels[shown];
  if (panel.budgets.some(each => each.keep === state.budget)) panel.choose(state.budget);
  const axis = [...panel.find(".axis").options].find(option => option.value === state.cost && !option.disabled);
  if (axis) panel.find(".axis").value = axis.value;
  [...panel.root.querySelectorAll(".groups button")].find(button => button.dataset.group === state.columns)?.click();
  panel.find(".only").checked = state.only === "1";
  panel.find(".find").value = state.find ?? "";
  panel.find(".find").dispatchEvent(new Event("input"));
  (state.hide ?? "").split("|").filter(name => panel.looks[name]).forEach(name => panel.hidden.add(name));
  panel.repaint();
};
