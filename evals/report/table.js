// Sorting, and the leaderboard's groups of columns.
const sortable = table => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    // numbers start with the largest, names with the first letter
    const value = row => row.cells[column].dataset.v;
    const rows = [...table.tBodies[0].rows];
    const numbers = rows.every(row => value(row) === "" || !isNaN(value(row)));
    const before = head.getAttribute("aria-sort");
    const down = before ? before === "ascending" : numbers;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return x === y ? 0 : x === "" ? 1 : -1; // what is empty stays below either way
      const order = numbers ? x - y : x.localeCompare(y, "en", { numeric: true });
      return down ? -order : order;
    });
    rows.forEach(row => row.classList.remove("first")); // lines between budgets mean nothing in another order
    table.tBodies[0].append(...rows);
  }));
};

const leaderboard = panel => {
  const table = panel.find("table.leaderboard"), rows = [...table.tBodies[0].rows];
  const buttons = [...panel.root.querySelectorAll(".groups button")];
  buttons.forEach(button => button.addEventListener("click", () => {
    buttons.forEach(other => {
      const on = other === button;
      other.setAttribute("aria-pressed", on);
      table.classList.toggle("show-" + other.dataset.group, on);
      panel.find(".foot.for-" + other.dataset.group).style.display = on ? "block" : "none";
    });
  }));
  const only = panel.find(".only"), find = panel.find(".find");
  const filter = () => rows.forEach(row => {
    const there = !only.checked || row.dataset.budget === panel.budget || row.dataset.budget === "";
    row.hidden = !(there && row.dataset.point.toLowerCase().includes(find.value.trim().toLowerCase()));
  });
  only.addEventListener("change", filter);
  find.addEventListener("input", filter);
  panel.on("budget", filter);
  const series = Object.fromEntries(panel.points.map(point => [point.label, point.series]));
  rows.forEach(row => {
    row.addEventListener("mouseenter", () => panel.focus(series[row.dataset.point]));
    row.addEventListener("mouseleave", () => panel.focus(null));
  });
  panel.find(".csv").addEventListener("click", () => {
    const columns = ["label", "series", "budget", "n", "accuracy", "low", "high", "vs_random", "vs_random_low", "vs_random_high", "holm", "verdict", "tokens", "flops", "decoder", "flops_share", "kv", "kv_share", "prefill"];
    const cell = value => { const text = value === null || value === undefined ? "" : String(value); return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text; };
    const shownRows = new Set(rows.filter(row => !row.hidden).map(row => row.dataset.point));
    const lines = panel.points.filter(point => shownRows.has(point.label)).map(point => columns.map(name => cell(point[name])).join(","));
    const file = new Blob([[columns.join(","), ...lines].join("\n") + "\n"], { type: "text/csv" });
    const link = make("a", { href: URL.createObjectURL(file), download: document.querySelector("h1").textContent.replace(/[^\w.-]+/g, "-") + ".csv" });
    link.click();
    URL.revokeObjectURL(link.href);
  });
  panel.on("focus", name => rows.forEach(row => row.classList.toggle("lit", name !== null && series[row.dataset.point] === name)));
};
