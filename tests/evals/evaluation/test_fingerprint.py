"""Which sources decide whether a kept answer may be used again: every module that asking imports, and its data."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from _imports import ROOT, imports, sources

import tokenprune
from tokenprune.evals.evaluation.fingerprint import (
    COUNTING,
    NO_ANSWER,
    code_fingerprint,
    costs_fingerprint,
    deciding_files,
)

ASKING = ("evals.evaluation.evaluate", "evals.evaluation.applied_method", "evals.tasks.load", "evals.models.load")
PLUG_INS = ("methods.", "interventions.", "cache_policies.", "adapters.", "kernels.", "evals.tasks.")
BESIDE = {
    # what a point is: it stands in the key of each row
    "evals.config.grid", "evals.config.measure", "evals.config.points", "evals.config.run_config",
    "evals.config.targets",
    # who answers: what of it decides is in the digest of the settings
    "evals.config.engines",
    # how rows are kept, and what is said when something fails
    "evals.errors", "evals.io.atomic_files", "evals.io.digest", "evals.io.row_store", "evals.io.rows",
    # what a prompt cost, and how a caller looks at it
    "cost", "handle", "prompt_view", "report",
}  # fmt: skip
"""Modules that asking imports and that decide no answer."""


def reached() -> set[str]:
    """Modules that a run imports between a sample and its answer; plug-ins are found by name, so all of them."""
    waiting = [*ASKING, *(module for module in sources() if module.startswith(PLUG_INS) and module != "kernels.aot")]
    found: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += [target for target in imports()[module] if target]
    return found


def module_names() -> set[str]:
    names = {name.removesuffix(".py").replace("/", ".") for name, _ in deciding_files() if name.endswith(".py")}
    return {name.removesuffix("__init__").rstrip(".") for name in names}


def test_every_module_that_asking_imports_is_in_it():
    assert len(reached()) > 80
    assert reached() - module_names() - BESIDE == set(), "say in BESIDE why it decides no answer, or walk its room"
    assert reached() >= BESIDE and not BESIDE & module_names()


def test_data_that_decides_is_in_it_and_recipes_are_not():
    names = {name for name, _ in deciding_files()}
    assert {"interventions/var_channels.yaml", "methods/holov.py", "adapters/llava.py", "kernels/merge.py"} <= names
    assert {"engine/engine.py", "evals/tasks/yaml_task.py", "evals/models/processor.py"} <= names
    assert not [name for name in names if name.startswith(("evals/report", "commands", "evals/pocket_training"))]


@pytest.mark.parametrize("name", [*NO_ANSWER, *COUNTING])
def test_what_is_left_out_exists(name):
    assert any((ROOT / folder / name).exists() for folder in ("", "tokenprune"))


def test_a_file_that_comes_or_changes_or_moves_changes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Laid out as in a wheel: everything inside the package."""
    for folder in ("tokenprune", "adapters", "kernels", "evals"):
        target = tmp_path / (folder if folder != "tokenprune" else ".")
        shutil.copytree(
            ROOT / folder, target, dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__", "*.safetensors", "*.parquet"),
        )  # fmt: skip
    before = code_fingerprint()
    monkeypatch.setattr(tokenprune, "__path__", [str(tmp_path)])
    assert code_fingerprint() == before, "a wheel of the same sources has the same answers"
    seen = {before}
    (tmp_path / "methods" / "deeper").mkdir()
    (tmp_path / "methods" / "deeper" / "new.py").write_text("x = 1\n")
    seen.add(code_fingerprint())
    (tmp_path / "methods" / "deeper" / "new.py").rename(tmp_path / "methods" / "deeper" / "other.py")
    seen.add(code_fingerprint())
    (tmp_path / "state" / "kv_cache.py").write_text("")
    seen.add(code_fingerprint())
    assert len(seen) == 4
    (tmp_path / "evals" / "report" / "page.py").write_text("")
    assert code_fingerprint() in seen
    answers, costs = code_fingerprint(), {costs_fingerprint()}
    for name in ("cost.py", "report.py", "evals/profiling/flops.py"):
        (tmp_path / name).write_text("")
        costs.add(costs_fingerprint())
    assert len(costs) == 4 and code_fingerprint() == answers, "what counts decides costs and no answer"


def test_weights_that_were_trained_anew_are_other_answers(tmp_path: Path):
    from _files import student

    from tokenprune.evals.config.run_config import RunConfig
    from tokenprune.evals.evaluation.applied_method import settings_digest
    from tokenprune.evals.models.load import LoadedModel

    loaded = LoadedModel("pocket-llava", None, None, "weights")

    def told(folder: str, method: str = "gtc") -> str:
        entry = {"method": method, "student": folder} if method == "gtc" else method
        return settings_digest(RunConfig("run", "pocket-llava", ["pocket"], [entry], keep=[16]), loaded, "task")

    shutil.copytree(student(0), tmp_path / "here")
    before = told(str(tmp_path / "here"))
    assert told(student(0)) == before != told("", "uniform")
    shutil.copyfile(Path(student(1)) / "student.safetensors", tmp_path / "here" / "student.safetensors")
    assert told(str(tmp_path / "here")) != before
