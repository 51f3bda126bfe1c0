"""The documentation site builds without a warning, its links lead somewhere, and the code on its pages runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from _paths import ROOT

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")


def test_the_site_builds_strictly_and_every_link_leads_somewhere(tmp_path):
    from check_links import complaints

    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(complaints(tmp_path)) == []
    from tokenprune import list_interventions, list_methods

    built = {page.relative_to(tmp_path).as_posix() for page in tmp_path.rglob("*.html")}
    assert built >= {f"methods/{name}.html" for name in list_methods()}
    assert built >= {f"interventions/{name}.html" for name in list_interventions()}


def test_the_checker_says_what_is_wrong(tmp_path):
    from check_links import complaints

    (tmp_path / "a.html").write_text(
        '<h1 id="top">A</h1><a href="b.html#here">fine</a><a href="b.html#gone">anchor</a><a href="c.html">file</a>'
        '<a href="/b.html">absolute</a><a href="https://no host/">form</a><a href="https://example.org/x#y">web</a>'
        '<script src="https://example.org/x.js"></script>'
    )
    (tmp_path / "b.html").write_text('<h2 id="here">B</h2>')
    found = list(complaints(tmp_path))
    assert len(found) == 5
    for word in ("#gone", "c.html", "'/b.html'", "no host", "x.js"):
        assert sum(word in line for line in found) == 1, word


def test_formulas_of_docstrings_are_set():
    from pages.formula import typeset

    assert typeset("s_j = sum_l a_{l,j} <= gamma V_j^2") == (
        "<i>s</i><sub><i>j</i></sub> = Σ<sub><i>l</i></sub> <i>a</i><sub><i>l</i>,<i>j</i></sub> ≤ <i>γ</i> "
        "<i>V</i><sub><i>j</i></sub><sup>2</sup>"
    )
    assert typeset("cos(x_i, y) < 1") == "cos(<i>x</i><sub><i>i</i></sub>, <i>y</i>) &lt; 1"


def test_docstrings_keep_their_words():
    """Nothing of a docstring is lost on its way to a page, the labels of evidence least of all."""
    from pages.docstring import described, module_docstring

    def words(text: str) -> set[str]:
        return set(re.findall(r"[A-Za-z]{4,}", re.sub(r"<[^>]+>|\]\([^)]*\)", " ", text)))

    for folder in ("tokenprune/methods", "tokenprune/interventions", "adapters"):
        for file in sorted((ROOT / folder).glob("[a-z]*.py")):
            doc = module_docstring(file)
            parts = described(doc)
            shown = [parts.does, parts.how, *sum(parts.notes, ()), *sum(parts.sources, ())]
            lost = words(doc) - words(" ".join(shown)) - {"https", "arxiv", "arXiv"}
            lost -= {word for word in lost if f"{word}_" in doc or f"_{word}" in doc or "alpha" in word}
            assert lost <= {"theta", "gamma", "beta", "kappa", "lambda", "mean", "softmax"}, (file.name, lost)


def test_code_of_the_pages_of_methods_and_interventions_can_be_applied():
    """Each page's method is one that `apply` reads; running all of them is what the tests of the methods do."""
    from pages import interventions, methods

    from tokenprune.plan.parse import parse_method

    made = {name: methods.snippet(name) for name in map(_stem, methods.pages()) if name != "index"}
    made |= {name: interventions.snippet(name) for name in map(_stem, interventions.pages())}
    for name, code in made.items():
        compile(code, name, "exec")
        plan = re.search(r"applied\(loaded\.model, \"(.+)\"\)", code)
        assert plan, name
        parse_method(plan[1])


def _stem(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".md")


def test_calls_that_the_migration_guide_gives_run():
    from _tiny import prompts, tiny_llava

    import tokenprune

    text = (ROOT / "docs" / "guides" / "migration.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if block.startswith("# here")]
    assert len(blocks) == 3
    for block in blocks:
        model, inputs = tiny_llava(layers=6), {**prompts([1]), "max_new_tokens": 2}
        names: dict = {"tokenprune": tokenprune, "model": model, "inputs": inputs}
        exec(compile(block, "migration.md", "exec"), names)
        if "handle" in names:
            model.generate(**inputs)
            names["handle"].remove()


@pytest.mark.pocket
@pytest.mark.parametrize(("kind", "name"), [("methods", "gtc"), ("interventions", "act"), ("families", "qwen2_5_vl")])
def test_code_of_a_page_of_each_kind_runs(kind, name, capsys):
    from importlib import import_module

    page = import_module(f"pages.{kind}").page(name)
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], f"{kind}/{name}", "exec"), {})
    assert name in capsys.readouterr().out or kind == "families"


@pytest.mark.pocket
def test_the_first_example_of_the_quick_start_runs(capsys):
    text = (ROOT / "docs" / "quick_start.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    exec(compile(example, "quick_start.md", "exec"), {})
    assert "64 of 576 visual tokens kept" in capsys.readouterr().out


def test_numbers_of_a_page_are_those_of_the_csv():
    import csv

    from pages import methods

    page = methods.page("vtc_cls")
    with (ROOT / "docs" / "leaderboards" / "pocket-llava.csv").open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["method"] == "vtc_cls" and row["family"] == "overall"]
    assert rows
    for row in rows:
        low, high = (f"{100 * float(row[key]):.0f}" for key in ("ci_low", "ci_high"))
        assert f"| {row['keep']} tokens | {100 * float(row['accuracy']):.1f} ({low} to {high}) |" in page
