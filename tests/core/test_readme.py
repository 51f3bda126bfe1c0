"""The README's code runs as written and its generated tables are up to date."""

from __future__ import annotations

import json
import re

import pytest
from _paths import ROOT

README = ROOT / "README.md"


def test_the_table_of_methods_is_what_the_registry_says():
    from tokenprune.evals.report.readme import between, methods_table

    text = README.read_text(encoding="utf-8")
    assert between(text, "methods", methods_table()) == text, "run: python -m tokenprune.evals.report.readme README.md"


@pytest.mark.pocket
def test_the_long_example_runs_as_written(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    example = next(block for block in blocks if "from_pretrained" in block)
    exec(compile(example, "README.md", "exec"), {})
    assert "64 of 576 visual tokens kept" in capsys.readouterr().out


def test_the_example_of_stages_runs_as_written():
    from _tiny import prompts, tiny_llava

    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    example = next(block for block in blocks if "plan = [" in block)
    model = tiny_llava(layers=6)  # as pocket-llava, which README loads
    names: dict = {"model": model}
    exec(compile("import tokenprune\n" + example, "README.md", "exec"), names)
    model(**prompts([1]))
    assert [stage.site for stage in names["handle"].stages] == ["input", "layer:3"]
    names["handle"].remove()


def test_the_first_example_runs_as_written(capsys):
    from _tiny import prompts, tiny_llava

    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(
        compile(blocks[0], "README.md", "exec"),
        {"model": tiny_llava(), "inputs": {**prompts([1]), "max_new_tokens": 3}},
    )
    assert "holov" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["pocket-llava", "pocket-qwen"])
def test_cards_show_what_was_measured(model):
    from tokenprune.evals.pocket_training.card import card_table
    from tokenprune.evals.pocket_training.measure import BUDGETS, DATA
    from tokenprune.evals.report.readme import between

    card = (ROOT / "evals" / "pocket" / "models" / model / "README.md").read_text(encoding="utf-8")
    result = json.loads((DATA / f"{model.replace('-', '_')}_conditions.json").read_text(encoding="utf-8"))
    met = {name: found["met"] for name, found in result["conditions"].items()}
    assert all(met.values()), met
    table = card_table(result, BUDGETS[model][0])
    assert between(card, "conditions", table) == card, f"run: python -m tokenprune.evals.pocket_training.card {model}"
