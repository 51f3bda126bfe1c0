// Samples: a list that is filtered, and one sample with what every method kept of its picture and said.
const MOST_LISTED = 400;
const DIMMED = "rgba(9, 11, 15, .8)";

const bitsOf = text => { const bytes = atob(text); return index => bytes.charCodeAt(index >> 3) >> (7 - (index & 7)) & 1; };

// rows and columns of the smaller raster that `count` tokens of a shrunk picture form
const shrunkGrid = (count, rows, cols) => {
  let best = null;
  for (let r = 1; r <= count; r++) if (count % r === 0) {
    const off = Math.abs(Math.log(r / (count / r) / (rows / cols)));
    if (best === null || off < best.off) best = { off, rows: r, cols: count / r };
  }
  return best.off < .25 ? best : null;
};

const overlay = (picture, view, bits, shrinks) => {
  const canvas = make("canvas", { width: picture.naturalWidth, height: picture.naturalHeight });
  const brush = canvas.getContext("2d"), [w, h] = [canvas.width, canvas.height];
  brush.drawImage(picture, 0, 0);
  if (!bits) return canvas;
  const on = i => bits(view.start + i), cells = view.rows * view.cols;
  let kept = 0;
  for (let i = 0; i < cells; i++) kept += on(i);
  const small = shrinks && kept < cells ? shrunkGrid(kept, view.rows, view.cols) : null;
  if (small) {
    // nothing is dropped: the whole picture is there, with fewer pixels
    const tiny = make("canvas", { width: Math.max(1, Math.round(w * small.cols / view.cols)), height: Math.max(1, Math.round(h * small.rows / view.rows)) });
    const other = tiny.getContext("2d");
    other.imageSmoothingQuality = "high";
    other.drawImage(picture, 0, 0, tiny.width, tiny.height);
    brush.imageSmoothingEnabled = false;
    brush.drawImage(tiny, 0, 0, w, h);
    return canvas;
  }
  brush.fillStyle = DIMMED;
  for (let i = 0; i < cells; i++) if (!on(i)) {
    const [r, c] = [Math.floor(i / view.cols), i % view.cols];
    const [x, y] = [Math.round(c * w / view.cols), Math.round(r * h / view.rows)];
    brush.fillRect(x, y, Math.round((c + 1) * w / view.cols) - x, Math.round((r + 1) * h / view.rows) - y);
  }
  return canvas;
};

const explorerOf = panel => {
  const { labels, samples, left_out: leftOut } = panel.explorer;
  const root = panel.find(".explorer"), list = root.querySelector(".list"), detail = root.querySelector(".sample");
  const [text, family, method, right, disagree, drawn] = ["text", "family", "method", "right", "disagree", "drawn"].map(name => root.querySelector(".filters ." + name));
  if (!samples.length) { root.querySelector(".browse").replaceChildren(make("p", { class: "empty" }, "The answers of these points are not in this page.")); root.querySelector(".filters").remove(); return; }
  const point = Object.fromEntries(panel.points.map(each => [each.label, each]));
  const columns = () => labels.map((label, index) => ({ index, point: point[label] })).filter(column => column.point.budget === "" || column.point.budget === panel.budget);
  const said = (sample, index) => sample.by[index] < 0 ? null : sample.said[sample.by[index]];
  const isRight = answer => answer !== null && answer[1] !== null && answer[1] >= .5;
  for (const name of [...new Set(samples.map(sample => sample.family))]) family.append(make("option", { value: name }, name));
  for (const series of panel.series) method.append(make("option", { value: series.name }, series.name));
  let current = null, found = [];

  const differ = sample => new Set(columns().map(column => said(sample, column.index)).filter(answer => answer).map(isRight)).size > 1;
  const passes = sample => {
    if (family.value && sample.family !== family.value) return false;
    if (drawn.checked && !sample.views) return false;
    const own = columns().filter(column => !method.value || column.point.series === method.value).map(column => said(sample, column.index)).filter(answer => answer !== null);
    if (right.value && !own.some(answer => isRight(answer) === (right.value === "right"))) return false;
    if (disagree.checked && !differ(sample)) return false;
    const wanted = text.value.trim().toLowerCase();
    return !wanted || [sample.question, sample.answer, sample.id, ...sample.said.map(answer => answer[0])].some(part => part.toLowerCase().includes(wanted));
  };
  const filter = () => {
    found = samples.filter(passes);
    const more = found.length > MOST_LISTED ? `, the first ${MOST_LISTED} are listed` : "";
    root.querySelector(".count").textContent = `${found.length} of ${samples.length} samples${more}` + (leftOut ? `; ${leftOut} had no room on this page` : "");
    list.replaceChildren(...found.slice(0, MOST_LISTED).map(sample => {
      const chips = make("span", { class: "chips" }, ...columns().map(column => {
        const answer = said(sample, column.index);
        return make("i", { class: answer === null ? "none" : isRight(answer) ? "" : "wrong", title: `${column.point.series}: ${answer ? answer[0] : "not asked"}` });
      }));
      const button = make("button", { type: "button", "data-id": sample.id, onclick: () => open(sample) }, make("span", {}, sample.question), make("span", { class: "has soft" }, sample.views ? "▣" : ""),
        make("span", { class: "meta" }, make("span", {}, sample.family), chips));
      return make("li", {}, button);
    }));
    if (!found.includes(current)) current = found.find(sample => sample.views && differ(sample)) ?? found.find(sample => sample.views) ?? found[0] ?? null;
    open(current);
  };
  const step = by => { const next = found[found.indexOf(current) + by]; if (next) open(next); };
  const open = sample => {
    current = sample;
    list.querySelectorAll("button").forEach(button => button.setAttribute("aria-current", sample !== null && button.dataset.id === sample.id));
    if (sample === null) { detail.replaceChildren(make("p", { class: "empty" }, "No sample is like that.")); return; }
    // within the list only: the page stays where the reader has it
    const item = list.querySelector('[aria-current="true"]')?.parentElement;
    if (item && (item.offsetTop < list.scrollTop || item.offsetTop + item.offsetHeight > list.scrollTop + list.clientHeight)) list.scrollTop = item.offsetTop - list.clientHeight / 3;
    const figures = columns().map(column => figureOf(sample, column));
    const many = sample.views && sample.views.length > 1 ? " many" : "";
    detail.replaceChildren(
      make("div", { class: "ask" }, make("div", {}, make("h4", {}, sample.question), make("span", { class: "soft" }, "expected: ", make("b", { class: "expected" }, sample.answer), ` · ${sample.family} · ${sample.id}`)),
        make("div", { class: "step" }, make("button", { type: "button", title: "the sample before", onclick: () => step(-1) }, "←"), make("button", { type: "button", title: "the next sample", onclick: () => step(1) }, "→"))),
      make("div", { class: "kept" + (sample.views ? many : " text") }, ...figures));
  };
  const pictures = new Map();
  const load = src => { if (!pictures.has(src)) { const picture = new Image(); pictures.set(src, new Promise(done => { picture.onload = () => done(picture); })); picture.src = src; } return pictures.get(src); };
  const figureOf = (sample, { index, point }) => {
    const answer = said(sample, index);
    const kind = point.series === "unpruned" ? "unpruned" : panel.looks[point.series].kind;
    const caption = make("figcaption", {}, make("div", { class: "who" }, make("i", { class: "dot " + kind, "--c": panel.colour(point.series) }), make("span", {}, point.series)),
      make("div", { class: "said " + (answer === null ? "" : isRight(answer) ? "right" : "wrong") }, answer === null ? "not asked" : answer[0] || "(nothing)"));
    if (!sample.views) return make("figure", {}, caption);
    const views = make("div", { class: "views", title: "press to see all of the picture" });
    let whole = false;
    const paint = async () => {
      const code = sample.kept[index], bits = whole || code === null || code === "" ? null : bitsOf(code);
      const drawnViews = await Promise.all(sample.views.map(async view => overlay(await load(view.src), view, bits, point.series.startsWith("downsample"))));
      views.replaceChildren(...drawnViews);
    };
    views.addEventListener("click", () => { whole = !whole; paint(); });
    paint();
    if (sample.kept[index] === null && kind !== "unpruned") caption.querySelector(".who").append(make("small", {}, "kept: not recorded"));
    return make("figure", {}, views, caption);
  };
  for (const control of [text, family, method, right, disagree, drawn]) control.addEventListener("input", filter);
  root.addEventListener("keydown", event => {
    if (event.target.matches("input, select")) return;
    const by = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
    if (by) { event.preventDefault(); step(by); }
  });
  panel.on("budget", filter);
  panel.repaintSamples = filter;
  filter();
};
