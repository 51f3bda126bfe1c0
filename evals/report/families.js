// One small chart a question family: a bar a method at the chosen budget.
const familiesOf = panel => {
  const box = panel.find(".families");
  const paint = () => {
    const points = panel.at(panel.budget), base = points.find(point => point.series === "unpruned");
    const families = [...new Set(points.flatMap(point => Object.keys(point.families)))];
    box.replaceChildren(...families.map(family => {
      const own = points.filter(point => point.families[family]).sort((a, b) => (b.series === "unpruned") - (a.series === "unpruned") || b.families[family][0] - a.families[family][0]);
      const counts = [...new Set(own.map(point => point.families[family][3]))];
      const rows = own.map(point => {
        const [at, low, high] = point.families[family];
        const bar = make("div", { class: "bar-box", "--c": panel.colour(point.series), title: `${percent(low)} to ${percent(high)}` },
          make("i", { style: `width:${100 * at}%` }), make("u", { style: `left:${100 * low}%;width:${100 * (high - low)}%` }));
        if (base && base.families[family]) bar.append(make("s", { style: `left:${100 * base.families[family][0]}%` }));
        const row = make("div", { class: "bar-row", "data-name": point.series }, make("span", { title: point.series }, point.series), bar, make("span", {}, percent(at, 0)));
        row.addEventListener("mouseenter", () => panel.focus(point.series));
        row.addEventListener("mouseleave", () => panel.focus(null));
        return row;
      });
      return make("div", { class: "family-bars" }, make("h4", {}, family, make("small", {}, counts.join(", ") + " questions")), ...rows);
    }));
  };
  panel.on("budget", paint);
  panel.on("focus", name => box.querySelectorAll(".bar-row").forEach(row => row.classList.toggle("on", row.dataset.name === name)));
  panel.repaintFamilies = paint;
  paint();
};
