// What stands behind a name: a sheet with what the method does, its paper, and the lines that apply it.
const sheet = make("dialog", { class: "about", "aria-label": "about a method" });
document.body.append(sheet);
sheet.addEventListener("click", event => { if (event.target === sheet) sheet.close(); });

const arxiv = (id, text) => make("a", { href: "https:" + "//arxiv.org/abs/" + id, target: "_blank", rel: "noopener" }, text);
const copied = text => {
  const button = make("button", { type: "button", class: "copy" }, "copy");
  button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(text); button.textContent = "copied"; } catch { button.textContent = "select it and press Ctrl+C"; }
  });
  return button;
};
const lines = (title, text) => make("div", {}, make("p", { class: "soft" }, title, " ", copied(text)), make("pre", {}, text));

const aboutOf = panel => {
  panel.root.querySelectorAll(".leaderboard button.name").forEach(button => button.addEventListener("click", () => {
    const about = panel.about[button.closest("tr").dataset.point];
    sheet.replaceChildren(
      make("div", { class: "head" }, make("h3", {}, about.title), make("button", { type: "button", class: "close", "aria-label": "close", onclick: () => sheet.close() }, "✕")),
      ...about.parts.map(part => make("p", {}, make("b", {}, part.name), " ", part.does, make("br"), make("span", { class: "soft" },
        part.source, part.arxiv ? " · " : null, part.arxiv ? arxiv(part.arxiv, "paper") : null))),
      about.apply ? lines("Apply it to a model of your own:", about.apply) : null,
      lines("Measure it again:", about.command));
    sheet.showModal();
  }));
};

// explanations that a pointer gets by resting on them, by a tap where there is no pointer
const bubble = make("div", { class: "bubble", hidden: "", role: "status" });
document.body.append(bubble);
document.addEventListener("click", event => {
  const node = event.target.closest("[title]");
  bubble.hidden = true;
  if (!node || matchMedia("(hover: hover)").matches || node.closest(".topbar, dialog")) return;
  bubble.textContent = node.title;
  bubble.hidden = false;
  const at = node.getBoundingClientRect(), room = document.documentElement.clientWidth - bubble.offsetWidth - 8;
  bubble.style.left = Math.max(8, Math.min(room, at.left)) + "px";
  bubble.style.top = (at.bottom + bubble.offsetHeight + 10 > innerHeight ? at.top - bubble.offsetHeight - 6 : at.bottom + 6) + "px";
});
document.addEventListener("scroll", () => { bubble.hidden = true; }, { capture: true, passive: true });
