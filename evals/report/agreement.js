// Who answers like whom at the chosen budget.
const MEASURES = { equal: "equal answers, percent", kappa: "Cohen's kappa of right and wrong, times 100" };

const matrix = (names, cells, title) => {
  // shades from the least to the most alike of this matrix, the diagonal left out
  const values = cells.flatMap((row, i) => row.filter((value, j) => value !== null && i !== j));
  const low = Math.min(...values), high = Math.max(...values);
  const head = make("tr", {}, make("th"), ...names.map(name => make("th", { scope: "col" }, make("span", {}, name))));
  const body = names.map((name, i) => make("tr", {}, make("th", { scope: "row" }, name), ...names.map((other, j) => {
    const value = cells[i][j];
    const share = i === j || value === null ? 0 : 6 + 66 * (value - low) / (high - low || 1);
    const text = i === j ? "" : value === null ? "\u2013" : percent(value, 0);
    return make("td", { title: `${name} and ${other}: ${value === null ? "not defined" : percent(value)}`,
      style: `background:color-mix(in srgb, var(--accent) ${share}%, var(--sheet))` }, text);
  })));
  return make("div", { class: "matrix scroll" }, make("h4", {}, title), make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
};

const agreementOf = panel => {
  const box = panel.find(".matrices");
  const paint = () => {
    const found = panel.agreement[panel.budget];
    box.replaceChildren(...(found ? Object.entries(MEASURES).map(([kind, title]) => matrix(found.names, found[kind], title))
      : [make("p", { class: "empty" }, "No two methods ran at this budget, or their answers are not at hand.")]));
  };
  panel.on("budget", paint);
  paint();
};
