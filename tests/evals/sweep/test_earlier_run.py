"""What happens to a folder that holds something already: finished results, a file, nothing that can be written."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from rich.console import Console

from tokenprune.cli import main
from tokenprune.evals.config.measure import Measure
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.errors import UserError
from tokenprune.evals.results.run_folder import read_run
from tokenprune.evals.sweep.sweep import run

NOTHING = Measure(samples=1, times=False, flops=False)


def config(folder: Path, model: str, task: str, **changes) -> RunConfig:
    settings = {"methods": ["uniform", "vtc_cls"], "keep": [9], "limit": 4, "references": False, "measure": NOTHING}
    return RunConfig(changes.pop("name", "mine"), model, [task], output=str(folder), **{**settings, **changes})


def test_finished_results_are_replaced_only_when_that_is_said(tmp_path, tiny_folder, tiny_task):
    quiet = Console(quiet=True)
    run(config(tmp_path, tiny_folder, tiny_task), quiet)
    before = (tmp_path / "results.jsonl").read_bytes()
    for changes, says in (
        ({"limit": 2}, "limit 4 there, 2 now"),
        ({"max_new_tokens": 2}, "max_new_tokens the default there, 2 now"),
        ({"seed": 3}, "seed 0 there, 3 now"),
        ({"methods": ["random"], "name": "other"}, "it is the run 'mine', whose uniform@9, vtc_cls@9 this run has not"),
    ):
        with pytest.raises(UserError, match=r"holds the finished results of other settings.*--force") as refused:
            run(config(tmp_path, tiny_folder, tiny_task, **changes), quiet)
        assert says in str(refused.value)
        assert (tmp_path / "results.jsonl").read_bytes() == before, "nothing was touched"
    # more samples and more methods go on with what is there
    more = run(config(tmp_path, tiny_folder, tiny_task, limit=6, methods=["uniform", "vtc_cls", "random"]), quiet)
    assert {record["overall"]["n"] for record in more.records} == {6} and not more.warnings
    # what a sweep no longer names is said to be left out, in the page too, for as long as its answers are there
    for _ in range(2):
        fewer = run(config(tmp_path, tiny_folder, tiny_task, limit=6, methods=["vtc_cls"]), quiet)
        (note,) = fewer.warnings
        assert "uniform@9, random@9, which this run does not name" in note
        assert (
            note in read_run(tmp_path).origin["notes"]
            and "uniform@9, random@9" in (tmp_path / "report.html").read_text()
        )
    forced = run(config(tmp_path, tiny_folder, tiny_task, limit=2), quiet, force=True)
    assert {record["overall"]["n"] for record in forced.records} == {2}


def test_the_command_line_asks_and_takes_force(tmp_path, tiny_folder, tiny_task, capsys):
    argv = ["eval", "--model", tiny_folder, "--tasks", tiny_task, "--method", "uniform", "--keep", "9", "--no-timing"]
    argv += ["--no-references", "--output", str(tmp_path / "out"), "--limit"]
    assert main([*argv, "4"]) == 0
    capsys.readouterr()
    assert main([*argv, "2"]) == 2
    assert "limit 4 there, 2 now. Name another folder" in capsys.readouterr().err.splitlines()[-1]
    assert main([*argv, "2", "--force"]) == 0


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "..", "", "a/../../b", "..\\evil", "C:\\evil", "a\nb"])
def test_a_name_cannot_leave_its_folder(name, tmp_path, tiny_folder, tiny_task, capsys):
    file = tmp_path / "sweep.yaml"
    settings = {"name": name, "model": tiny_folder, "tasks": [tiny_task], "methods": ["uniform"], "keep": [9]}
    file.write_text(json.dumps(settings))
    assert main(["sweep", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tokenprune: name is the run's folder below runs/") and repr(name) in said
    RunConfig("papers/llava", tiny_folder, [tiny_task], ["uniform"], [9]).check()


COMMANDS = {
    "eval": ["--method", "uniform", "--keep", "9", "--output"],
    "sweep": ["demo", "--output"],
    "demo": ["--output"],
    "recommend": ["--max-drop", "0.2", "--output"],
    "tune": ["vflowopt", "--budget", "0.25", "--output"],
    "train": ["gtc", "--output"],
    "diagnose": ["--out"],
    "report": ["FINISHED", "--output"],
    "calibrate": ["fitprune", "--output"],
}


WORK = [
    f"tokenprune.evals.{name}"
    for name in ("diagnose.diagnose", "sweep.model_worker", "tuning.calibrate", "tuning.tune", "learned.gtc")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_written_is_said_before_any_work(command, tmp_path, capsys, monkeypatch):
    """A file where a folder has to be, and a place that takes no files, whoever asks (root too)."""
    if command in ("recommend", "tune"):
        pytest.importorskip("optuna")
    for module in WORK:  # whoever is imported for the first time below would keep what is put in place here
        importlib.import_module(module)
    for module in ("tokenprune.evals.models.load", *WORK):
        monkeypatch.setattr(f"{module}.load_model", None)
    monkeypatch.setattr("tokenprune.evals.results.run_folder.read_run", None)
    taken = tmp_path / "taken"
    taken.write_text("mine")
    names_file = command in ("report", "calibrate")
    for folder, says in ((taken, "is a file, and results need a folder"), (Path("/proc/x"), "Nothing can be")):
        given = folder / "out.json" if names_file else folder
        argv = [str(tmp_path) if word == "FINISHED" else word for word in COMMANDS[command]]
        assert main([command, *argv, str(given)]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("tokenprune: ") and says in captured.err and "Traceback" not in captured.err
        assert "out" not in [file.name for file in tmp_path.iterdir()] and taken.read_text() == "mine"
