// Accuracy against cost: points, intervals, the Pareto front, a legend that hides and shows.
const AXES = { flops: "GFLOPs to the first token", decoder: "GFLOPs of selection and prefill", kv: "KV cache of one prompt, KiB", prefill: "median prefill time, ms", tokens: "visual tokens, averaged over the decoder's layers" };
const SHAPES = {
  circle: "M-4.6 0a4.6 4.6 0 1 0 9.2 0a4.6 4.6 0 1 0-9.2 0z", square: "M-4.2-4.2h8.4v8.4h-8.4z", triangle: "M0-5.4L5 3.8H-5z",
  down: "M0 5.4L5-3.8H-5z", diamond: "M0-5.8L5.2 0 0 5.8-5.2 0z", cross: "M-1.7-5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
  star: "M0-8L8 0 0 8-8 0z",
};

const ticks = (low, high, count) => {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
};

// points that no other beats at the same cost or less
const frontOf = (points, axis) => {
  const front = [];
  for (const point of [...points].sort((a, b) => a[axis] - b[axis] || b.accuracy - a.accuracy))
    if (!front.length || point.accuracy > front[front.length - 1].accuracy) front.push(point);
  return front;
};

// points of one budget that cost nearly the same are moved sideways in the order of the legend, so that all can be seen;
// never so far that two budgets would mix
const spread = (points, series, at, room) => {
  const place = Object.fromEntries(series.map((name, index) => [name, index])), shift = new Map(), groups = [];
  const middle = group => group.reduce((sum, point) => sum + at(point), 0) / group.length;
  for (const budget of new Set(points.map(point => point.budget))) {
    const sorted = points.filter(point => point.budget === budget).sort((a, b) => at(a) - at(b));
    for (let start = 0; start < sorted.length;) {
      let end = start + 1;
      while (end < sorted.length && at(sorted[end]) - at(sorted[end - 1]) < 14) end++;
      groups.push(sorted.slice(start, end).sort((a, b) => place[a.series] - place[b.series]));
      start = end;
    }
  }
  for (const group of groups) {
    const here = middle(group);
    const gaps = groups.filter(other => other !== group && other.length > 1).map(other => Math.abs(middle(other) - here));
    const width = Math.min(room, ...gaps.map(gap => .8 * gap));
    const step = group.length > 1 ? Math.min(12, width / (group.length - 1)) : 0;
    group.forEach((point, index) => shift.set(point, here + (index - (group.length - 1) / 2) * step));
  }
  return shift;
};

const plotOf = panel => {
  const box = panel.find(".plot"), legend = panel.find(".legend"), axisBox = panel.find(".axis");
  const hidden = new Set();
  panel.hidden = hidden;
  const names = panel.series.map(series => series.name);
  for (const option of [...axisBox.options]) option.disabled = !panel.points.some(point => point[option.value] !== null);
  if (axisBox.selectedOptions[0].disabled) axisBox.value = "tokens";
  panel.usualAxis = axisBox.value;
  const tip = make("div", { class: "tip", hidden: "" });

  const say = (point, x, y) => {
    const rows = [`<b>${make("i", {}, point.label === "none" ? "unpruned" : point.label).innerHTML}</b>`,
      `${percent(point.accuracy)} % <small>${percent(point.low)} to ${percent(point.high)}</small>`];
    if (point.vs_random !== null) rows.push(`${signed(point.vs_random)} points to random at equal tokens <small>${signed(point.vs_random_low)} to ${signed(point.vs_random_high)}, ${point.verdict}</small>`);
    rows.push(`${short(point.tokens)} visual tokens`);
    if (point.flops !== null) rows.push(`${short(point.flops)} GFLOPs <small>${percent(point.flops_share, 0)} % of unpruned</small>`);
    if (point.kv !== null) rows.push(`${short(point.kv)} KiB of KV${point.kv_share === null ? "" : ` <small>${percent(point.kv_share, 0)} %</small>`}`);
    if (point.prefill !== null) rows.push(`${short(point.prefill)} ms of prefill`);
    tip.innerHTML = rows.join("<br>");
    tip.hidden = false;
    const wide = box.clientWidth, left = x + 16 + tip.offsetWidth > wide ? x - 16 - tip.offsetWidth : x + 16;
    tip.style.left = Math.max(0, left) + "px";
    tip.style.top = Math.max(0, y - tip.offsetHeight / 2) + "px";
  };

  const paint = () => {
    const axis = axisBox.value, width = box.clientWidth, narrow = width < 560, height = narrow ? 340 : 440;
    if (!width) return;
    const [left, right, top, bottom] = [46, 14, 12, 46];
    const shown = panel.points.filter(point => !hidden.has(point.series) && point[axis] !== null);
    box.replaceChildren(tip);
    tip.hidden = true;
    if (!shown.length) { box.append(make("p", { class: "empty" }, "Nothing to show: every method is hidden, or this cost was not measured.")); return; }
    const xs = shown.map(point => point[axis]);
    const log = Math.max(...xs) / Math.min(...xs) > 4;
    const scale = log ? Math.log : value => value;
    let [x0, x1] = [Math.min(...xs.map(scale)), Math.max(...xs.map(scale))];
    const pad = (x1 - x0 || 1) * (narrow ? .1 : .08);
    [x0, x1] = [x0 - pad, x1 + pad];
    let y0 = Math.max(0, Math.floor(20 * Math.min(...shown.map(point => point.low)) - .3) / 20);
    let y1 = Math.min(1, Math.ceil(20 * Math.max(...shown.map(point => point.high)) + .1) / 20);
    const X = value => left + (scale(value) - x0) / (x1 - x0) * (width - left - right);
    const Y = value => height - bottom - (value - y0) / (y1 - y0) * (height - top - bottom);
    const place = spread(shown, names, point => X(point[axis]), narrow ? 60 : 130);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "accuracy against " + AXES[axis] });
    for (const value of ticks(100 * y0, 100 * y1, 7)) svg.append(
      draw("line", { class: "grid", x1: left, x2: width - right, y1: Y(value / 100), y2: Y(value / 100) }),
      draw("text", { x: left - 8, y: Y(value / 100) + 4, "text-anchor": "end" }, String(value)));
    // a log axis is labelled where the points are: one label for each cluster of them
    let marks = log ? [] : ticks(x0, x1, narrow ? 4 : 8);
    if (log) for (const value of [...new Set(shown.map(point => point[axis]))].sort((a, b) => a - b)) if (!marks.length || X(value) - X(marks[marks.length - 1]) > 58) marks.push(value);
    for (const value of marks) {
      svg.append(draw("line", { class: "grid", x1: X(value), x2: X(value), y1: top, y2: height - bottom }),
        draw("text", { x: X(value), y: height - bottom + 18, "text-anchor": "middle" }, short(value)));
    }
    svg.append(draw("text", { class: "label", x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, AXES[axis] + (log ? " (log)" : "")),
      draw("text", { class: "label", transform: `translate(12 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, "accuracy, percent"));
    const base = panel.points.find(point => point.series === "unpruned");
    if (base && !hidden.has("unpruned")) svg.append(
      draw("rect", { class: "band", x: left, width: width - left - right, y: Y(base.high), height: Math.max(0, Y(base.low) - Y(base.high)) }),
      draw("line", { class: "base", x1: left, x2: width - right, y1: Y(base.accuracy), y2: Y(base.accuracy) }));
    if (panel.find(".tools .front").checked) {
      const front = frontOf(shown.filter(point => panel.looks[point.series].kind !== "reference"), axis);
      svg.append(draw("path", { class: "front", d: "M" + front.map(point => `${place.get(point)} ${Y(point.accuracy)}`).join("L") }));
    }
    const moved = [];
    for (const series of panel.series) {
      const own = shown.filter(point => point.series === series.name).sort((a, b) => a[axis] - b[axis]);
      if (!own.length) continue;
      const group = draw("g", { class: "series " + series.kind, "data-name": series.name });
      group.style.setProperty("--c", panel.colour(series.name));
      group.append(draw("path", { class: "line", d: "M" + own.map(point => `${place.get(point)} ${Y(point.accuracy)}`).join("L") }));
      for (const point of own) {
        const [x, y] = [place.get(point), Y(point.accuracy)];
        if (Math.abs(x - X(point[axis])) >= 1.5) {
          group.append(draw("line", { class: "moved", x1: X(point[axis]), x2: x, y1: y, y2: y }));
          moved.push(Math.abs(x - X(point[axis])));
        }
        if (panel.find(".tools .bars").checked) group.append(draw("line", { class: "interval", x1: x, x2: x, y1: Y(point.low), y2: Y(point.high) }));
        const mark = draw("path", { class: "mark", d: SHAPES[series.marker], transform: `translate(${x} ${y})`, "data-point": point.label });
        mark.addEventListener("mouseenter", () => { say(point, x, y); panel.focus(series.name); });
        mark.addEventListener("mouseleave", () => { tip.hidden = true; panel.focus(null); });
        mark.addEventListener("click", () => { if (point.budget) panel.choose(point.budget); });
        group.append(mark);
      }
      svg.append(group);
    }
    box.append(svg);
    panel.find(".moved-note").textContent = moved.length ? `${moved.length} of ${shown.length} points would hide each other and stand beside their cost, the farthest by ${Math.round(100 * Math.max(...moved) / (width - left - right))} percent of the axis; a thin line leads to it.` : "Every point stands at its cost.";
  };

  const keys = panel.series.map(series => {
    const icon = draw("svg", { viewBox: "-9 -9 18 18" }, draw("path", series.kind === "reference"
      ? { d: SHAPES[series.marker], fill: "none", stroke: "currentColor", "stroke-width": 2 } : { d: SHAPES[series.marker], fill: "currentColor" }));
    const key = make("button", { type: "button", "aria-pressed": "true", "data-name": series.name, title: series.name }, icon, make("span", {}, series.name));
    key.addEventListener("click", () => { hidden.has(series.name) ? hidden.delete(series.name) : hidden.add(series.name); show(); });
    key.addEventListener("dblclick", () => { names.forEach(name => name === series.name ? hidden.delete(name) : hidden.add(name)); show(); });
    key.addEventListener("mouseenter", () => panel.focus(series.name));
    key.addEventListener("mouseleave", () => panel.focus(null));
    return key;
  });
  const all = make("button", { type: "button", class: "all", onclick: () => { hidden.size ? hidden.clear() : names.forEach(name => hidden.add(name)); show(); } }, "show all");
  legend.append(...keys, all);
  const show = () => {
    keys.forEach(key => { key.setAttribute("aria-pressed", !hidden.has(key.dataset.name)); key.style.setProperty("--c", panel.colour(key.dataset.name)); });
    all.textContent = hidden.size ? "show all" : "hide all";
    paint();
    panel.changed?.();
  };
  panel.on("focus", name => {
    const svg = box.querySelector("svg");
    if (!svg) return;
    svg.classList.toggle("focus", name !== null && !hidden.has(name));
    svg.querySelectorAll("g.series").forEach(group => group.classList.toggle("on", group.dataset.name === name));
  });
  for (const control of [axisBox, panel.find(".tools .bars"), panel.find(".tools .front")]) control.addEventListener("change", paint);
  new ResizeObserver(paint).observe(box);
  panel.repaint = show;
  show();
};
