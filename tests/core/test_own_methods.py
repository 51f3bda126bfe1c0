"""Methods that are not ours: a package that is broken harms nobody but itself, a file is imported by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from _families import batch_of, family

import tokenprune
from tokenprune import registry, user_files
from tokenprune.cli import main

MINE = '''
"""Keeps what comes first."""
from dataclasses import dataclass

from tokenprune import Pruner, register_method


@register_method("{name}")
@dataclass
class First(Pruner):
    """Keeps what comes first."""

    sign: float = 1.0

    def score(self, view):
        return -self.sign * view.features.float().cumsum(1).abs().sum(-1).argsort(-1).float()
'''


def package(folder: Path, module: str, text: str, entries: str) -> None:
    """An installed package `outsider` with one module."""
    (folder / f"{module}.py").write_text(text)
    info = folder / "outsider-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outsider\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)


@pytest.fixture
def clean(tmp_path, monkeypatch):
    """Registries and imported files as they were before, whatever the test leaves."""
    kinds = (registry.METHODS, registry.MODELS, registry.INTERVENTIONS)
    files, seen = dict(user_files._imported), list(user_files._seen)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._installed.cache_clear()
    yield tmp_path
    registry._installed.cache_clear()
    for one in kinds:
        one._broken.clear()
        for name in set(one._classes) - set(one._files()):
            one.unregister(name)
    user_files._imported, user_files._seen[:] = files, seen


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import no_such_module_at_all\n", r"cannot be imported \(ModuleNotFoundError: No module named"),
        ("raise RuntimeError('needs a licence')\n", r"cannot be imported \(RuntimeError: needs a licence\)"),
        ("", r"registers no model family of that name"),
    ],
)
def test_a_broken_family_switches_itself_off_and_no_other(clean, text, why):
    package(clean, f"broken_{abs(hash(text))}", text, f"[tokenprune.adapters]\nodd = broken_{abs(hash(text))}\n")
    assert "odd" in registry.MODELS.names(), "listing imports nothing"
    with pytest.warns(RuntimeWarning, match=f"'odd' is switched off: .*{why}.*its package is outsider.*else works"):
        handle = tokenprune.apply(family("llava"), "uniform@3")
    handle.remove()
    assert "odd" not in registry.MODELS.names()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenprune.apply(family("llava"), "uniform@3").remove()  # said once
    with pytest.raises(registry.UnknownName, match=f"'odd' is switched off: .*{why}"):
        registry.MODELS.get("odd")


def test_a_name_that_differs_from_its_entry_point_is_said(clean):
    package(clean, "differs", MINE.format(name="first_ones"), "[tokenprune.methods]\nfirst_one = differs\n")
    with pytest.warns(RuntimeWarning, match="registers no method of that name, but first_ones"):
        loaded = registry.METHODS.loaded()
    assert "first_one" not in loaded and {"first_ones", "holov"} <= set(loaded)


def test_a_file_of_ones_own_runs_from_the_command_line(clean, capsys):
    file = clean / "my method.py"
    file.write_text(MINE.format(name="mine_first"))
    assert main(["ls", "methods", "mine_first", "--import", str(file)]) == 0
    assert "sign = 1.0" in capsys.readouterr().out
    assert user_files.VARIABLE not in os.environ, "named to child processes, and only while the command runs"
    with tokenprune.applied(family("llava"), "mine_first@3") as handle:
        family("llava")(**batch_of("llava", "one_left"))
        assert len(handle.kept[0][0]) == 3
    # a changed file answers anew
    from tokenprune.evals.evaluation.fingerprint import code_fingerprint

    before = code_fingerprint()
    file.write_text(file.read_text() + "\n# changed\n")
    assert code_fingerprint() != before


@pytest.mark.slow
def test_processes_that_a_command_starts_know_it(clean):
    file = clean / "mine.py"
    file.write_text(MINE.format(name="in_a_worker"))
    code = "from tokenprune.registry import METHODS; print(METHODS.get('in_a_worker').name)"
    with user_files.importing([str(file)]):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "in_a_worker", done.stderr


def test_a_worker_of_a_cluster_that_ran_before_knows_it(clean, monkeypatch):
    pytest.importorskip("ray")
    from tokenprune.evals.config.run_config import RunConfig
    from tokenprune.evals.io.folder_lock import holder_file
    from tokenprune.evals.sweep.executors.ray import _start

    file = clean / "mine.py"
    file.write_text(MINE.format(name="on_a_cluster"))
    config = RunConfig("x", "pocket-llava", ["pocket"], ["on_a_cluster"], [9], output=str(clean))
    holder_file(config.folder).write_text(json.dumps({}))
    monkeypatch.setenv(user_files.VARIABLE, "")
    monkeypatch.chdir(clean)
    _start(config, (str(clean), str(file)))
    config.check()
    assert "on_a_cluster" in registry.METHODS.names()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "There is no file"),
        ("def f(:\n", "cannot be imported: SyntaxError at line 1"),
        ("x = 1\nimport nothing_like_it\n", "cannot be imported: ModuleNotFoundError at line 2"),
        ("raise SystemExit(0)\n", "cannot be imported: SystemExit at line 1"),
        (MINE.format(name="holov"), "The method name 'holov' is taken by"),
    ],
)
def test_a_file_that_cannot_be_imported_is_a_sentence(clean, text, says, capsys):
    file = clean / "broken.py"
    if text is not None:
        file.write_text(text)
    assert main(["ls", "methods", "--import", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tokenprune: ") and says in said and "Traceback" not in said
    assert main(["ls", "methods", "--import", str(clean)]) == 2
    assert "There is no file" in capsys.readouterr().err
