// Light and dark, and tables that sort.
const dark = matchMedia("(prefers-color-scheme: dark)");
const setTheme = name => { document.documentElement.dataset.theme = name; };
setTheme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
document.querySelector(".theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
document.querySelectorAll("table.sort").forEach(sortable);
document.querySelectorAll(".links a").forEach(link => link.addEventListener("click", () => document.getElementById(link.dataset.to).scrollIntoView({ behavior: "smooth" })));
