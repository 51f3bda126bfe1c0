"""Tuning: the objective, the study that survives a kill, and files that `apply` and `eval` take."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from _paths import ROOT

pytest.importorskip("optuna")

import tokenprune
from tokenprune.cli import main
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.errors import UserError
from tokenprune.evals.tasks.unlabelled import SelectionRequest, draw_samples
from tokenprune.evals.tuning import tune as tuning
from tokenprune.evals.tuning.tune import Discrepancy, TuneConfig, tune
from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.search_space import Choice, Range
from tokenprune.registry import METHODS


@pytest.fixture
def config(tmp_path, tiny_folder, tiny_task) -> TuneConfig:
    return TuneConfig(
        "vflowopt", tiny_folder, tiny_task, 0.5, samples=5, held_out=4, trials=4, random_trials=3,
        output=str(tmp_path / "study"),
    )  # fmt: skip


@pytest.fixture
def asked(tiny_task) -> list[SelectionRequest]:
    return draw_samples(tiny_task, 5, 1, 0)[0]


def states(config: TuneConfig) -> list[str]:
    import optuna

    study = optuna.load_study(study_name=config.method, storage=f"sqlite:///{config.folder / 'study.db'}")
    return [trial.state.name for trial in study.trials]


def test_the_objective_is_one_exactly_where_nothing_changes_and_below_it_elsewhere(tiny, asked):
    import torch

    objective = Discrepancy(tiny, asked, batch_size=3)
    values, kept = objective({"method": "vflowopt", "keep": 1.0})
    assert values == pytest.approx([1.0] * 5, abs=1e-12) and kept == 1
    values, kept = objective({"method": "vflowopt", "keep": "avg0.5"})
    assert all(value < 1 for value in values) and kept == pytest.approx(0.5, rel=0.05)
    # by hand, one prompt at a time, from what transformers calls the last hidden state
    for sample, value in zip(asked, values):
        inputs = tiny.inputs([sample.question], [sample.image])
        with torch.no_grad():
            plain = tiny.model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
            with tokenprune.applied(tiny.model, {"method": "vflowopt", "keep": "avg0.5"}):
                pruned = tiny.model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        assert float(torch.cosine_similarity(plain.double(), pruned.double(), dim=0)) == pytest.approx(value, abs=1e-5)


def test_a_study_is_written_down_and_its_method_can_be_applied(config, tiny):
    found = tune(config)
    assert states(config) == ["COMPLETE"] * 4
    assert found.best.tuned_on >= found.shipped.tuned_on - 1e-9, "the shipped settings are the first trial"
    assert found.shipped.method["threshold"] == pytest.approx(28.7, abs=0.1)
    result = json.loads((config.folder / "result.json").read_text())
    assert result["best"]["held_out"] == pytest.approx(sum(result["best"]["held_out_each"]) / 4)
    rows = (config.folder / "trials.csv").read_text().splitlines()
    assert rows[0] == "trial,state,objective,retention,alpha,cell,first,second,threshold" and len(rows) == 5
    assert max(float(row.split(",")[2]) for row in rows[1:]) == pytest.approx(found.best.tuned_on, abs=1e-5)
    path = found.files[0]
    with tokenprune.applied(tiny.model, path) as handle:
        assert handle.label.startswith("vflowopt@") and len(handle.stages) == 3
        assert handle.method.mean == pytest.approx([0.48145466, 0.4578275, 0.40821073]), "what the processor takes"
    run = RunConfig("x", config.model, [config.data], [str(path)], references=False)
    run.check()
    (point,) = run.points()
    assert point.method == "vflowopt" and point.keep == found.best.method["keep"]


def test_a_killed_study_goes_on(config, monkeypatch):
    calls = 0
    whole = Discrepancy.__call__

    def dies(self, method):
        nonlocal calls
        calls += 1
        if calls == 4:  # the check of the shipped settings, and three trials
            raise SystemExit("killed")
        return whole(self, method)

    monkeypatch.setattr(Discrepancy, "__call__", dies)
    with pytest.raises(SystemExit):
        tune(config)
    before = states(config)
    assert before == ["COMPLETE", "COMPLETE", "RUNNING"], "as after a kill, nobody closed the third trial"
    calls = 100
    assert tune(config).trials == 5
    assert states(config) == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    import csv

    with (config.folder / "trials.csv").open() as file:
        tried = [row["first"] for row in csv.DictReader(file)]
    assert len(set(tried)) == len(tried), "a study that goes on draws no trial again"
    found = tune(config)
    assert found.trials == 5, "done is done"


def test_a_study_of_other_settings_is_not_mixed_in(config):
    config.trials = 1
    tune(config)
    config.budget = 0.4
    with pytest.raises(UserError, match=r"made with budget = 0.5, not 0.4; give another --output"):
        tune(config)


def test_another_method_is_tuned_by_the_same_command(config, tiny_folder, tiny_task, tmp_path, capsys):
    argv = ["tune", "fastv", "--model", tiny_folder, "--data", tiny_task, "--budget", "0.6", "--samples", "4"]
    argv += ["--held-out", "2", "--trials", "4", "--output", str(tmp_path / "fastv")]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "shipped" in printed and "held-out" in printed and str(tmp_path / "fastv" / "fastv.yaml") in printed
    rows = (tmp_path / "fastv" / "trials.csv").read_text().splitlines()
    layers = {row.split(",")[4]: row.split(",")[1] for row in rows[1:]}
    assert layers["2"] == "complete"
    assert layers.get("3", "pruned") == "pruned", "three of four layers keep all: a mean of 0.6 cannot be held"


def test_a_method_from_outside_declares_its_own_space(config):
    @tokenprune.register_method("toy_tuned")
    @dataclass
    class Toy(Pruner):
        """Keeps the first or the last."""

        end: str = "first"
        power: int = 1

        @classmethod
        def search_space(cls, mean: float, depths: Any) -> Mapping[str, Range | Choice]:
            return {"end": Choice(("first", "last")), "power": Range(1, 3)}

        def score(self, view: Any) -> Any:
            import torch

            places = torch.arange(view.num_tokens).float().expand(view.num_images, -1)
            return -places if self.end == "first" else places

    try:
        config.method, config.trials = "toy_tuned", 6
        found = tune(config)
        assert found.shipped.method == {"method": "toy_tuned", "keep": "avg0.5"}, "power has no shipped value"
        assert found.best.method["end"] in ("first", "last") and found.best.method["power"] in (1, 2, 3)
        config.output, config.options = f"{config.output}-fixed", {"end": "last"}
        assert tune(config).best.method["end"] == "last"
    finally:
        METHODS.unregister("toy_tuned")


def test_no_picture_is_in_both_sets_and_the_seed_decides(tmp_path):
    from PIL import Image

    lines = []
    for number in range(6):
        Image.new("RGB", (8, 8), (40 * (number // 2), 9, 9)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": f"what {number}"}))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    for seed in range(5):
        first, rest = draw_samples(str(tmp_path), 2, 2, seed)
        shades = [{sample.image.getpixel((0, 0)) for sample in part} for part in (first, rest)]
        assert not shades[0] & shades[1]
        again, _ = draw_samples(str(tmp_path), 2, 2, seed)
        assert [sample.question for sample in first] == [sample.question for sample in again]
    with pytest.raises(ValueError, match="gives 3 sample.s. to tune on and"):
        draw_samples(str(tmp_path), 3, 9, 0)
    with pytest.raises(ValueError, match="gives 6 sample.s. to tune on and 0 held-out"):
        draw_samples(str(tmp_path), 6, 1, 0)


@pytest.mark.parametrize(
    ("data", "videos"), [("pocket-mixed", 3), ("pocket-mixed:video", 6), ("pocket-mixed:count", 0)]
)
def test_the_mixed_suite_is_drawn_from_its_own_validation_split(data, videos):
    samples = [one for part in draw_samples(data, 4, 2, 1) for one in part]
    assert sum(isinstance(one.image, list) for one in samples) == videos
    assert all(one.sample_id.startswith("val-") for one in samples)
    if data.endswith("count"):
        assert {one.sample_id.rpartition("-")[2] for one in samples} == {"count"}
    assert len({one.image.size for one in samples if not isinstance(one.image, list)}) > 1 or videos == 6


def test_pocket_means_its_validation_split(monkeypatch):
    from PIL import Image

    from tokenprune.evals.pocket import suite

    asked_for = []

    def load(split: str, scenes: int) -> list[dict[str, Any]]:
        asked_for.append((split, scenes))
        return [
            {"sample_id": f"{scene}-{family}", "scene_id": str(scene), "family": family, "question": family,
             "answer": "yes", "image": Image.new("RGB", (4, 4), (scene, 0, 0))}
            for scene in range(scenes) for family in ("exist", "count", "read")
        ]  # fmt: skip

    monkeypatch.setattr(suite, "load", load)
    first, rest = draw_samples("pocket", 8, 4, 42)
    assert asked_for == [("val", 12)]
    assert [sample.sample_id.split("-")[0] for sample in first + rest] == [str(scene) for scene in range(12)]
    assert {sample.question for sample in first} == {"exist", "count", "read"}
    assert {sample.question for sample in draw_samples("pocket:count", 3, 2, 0)[0]} == {"count"}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["vflowop", "--budget", "0.25"], "Did you mean 'vflowopt'"),
        (["none", "--budget", "0.25"], "nothing to tune"),
        (["vflowopt", "--budget", "64"], "as a kept fraction in (0, 1], got 64"),
        (["vflowopt", "--budget", "0.25", "--trials", "0"], "--trials must be at least 1, got 0"),
        (["vflowopt", "--budget", "0.25", "--held-out", "0"], "--held-out must be at least 1, got 0"),
        (["vflowopt", "--budget", "0.25", "--data", "poket"], "Did you mean 'pocket'"),
        (["vflowopt", "--budget", "0.25", "--data", "tests"], "tests holds no questions.jsonl; write one"),
        (["random", "--budget", "0.25"], "random declares nothing to search. Methods that do: dart, fastv, vflowopt"),
    ],
)
def test_refuses_with_a_sentence(argv, says, capsys, tiny_folder, tiny_task, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = ["tune", *argv, "--model", tiny_folder, "--output", str(tmp_path / "none")]
    if "--data" not in argv:
        argv += ["--data", tiny_task]
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("tokenprune: ") and says in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_without_optuna_it_says_what_to_install(config, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        tuning.importlib.util, "find_spec", lambda name, *a: None if name == "optuna" else find(name, *a)
    )
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"needs Optuna: pip install 'tokenprune-vlm\[tune\]'"):
        tune(config)


def test_eval_takes_the_file(tmp_path, tiny_folder, tiny_task, capsys):
    path = tmp_path / "tuned.yaml"
    path.write_text("# how it was made\nmethod: vflowopt\nkeep: 0.3\nfirst: 0.6\ncell: 2.5\n")
    argv = ["eval", "--model", tiny_folder, "--tasks", tiny_task, "--method", str(path), "--limit", "4", "--no-timing"]
    assert main([*argv, "--no-references", "--output", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[0])
    assert (record["shown"], record["options"]) == ("tuned", {"cell": 2.5, "first": 0.6})
    path.write_text("keep: 0.3\n")
    assert main([*argv, "--output", str(tmp_path / "out")]) == 2
    assert "must hold a mapping whose key 'method' names one method" in capsys.readouterr().err


def test_samples_to_tune_on_have_pictures_one_or_several(tmp_path, monkeypatch):
    from PIL import Image

    from tokenprune.evals.tasks import unlabelled
    from tokenprune.evals.tasks.task import Sample

    red, blue, green = (Image.new("RGB", (9, 9), name) for name in ("red", "blue", "green"))
    shown = [(), (red, blue), (red, green), (), (red, blue)]
    samples = [Sample(str(place), "all", "q", "x", each) for place, each in enumerate(shown)]
    monkeypatch.setattr(unlabelled, "_candidates", lambda *given: iter(samples))
    first, others = unlabelled.draw_samples("any", 1, 1, 0)
    assert [one.sample_id for one in (*first, *others)] == ["1", "2"]
    with pytest.raises(ValueError, match="gives 1 sample.* and 1 held-out"):
        unlabelled.draw_samples("any", 1, 2, 0)


@pytest.mark.parametrize("line", [{"image": "a.png"}, {"question": "q"}, {"image": "a.png", "question": None}])
def test_a_line_of_a_folder_that_lacks_something_is_named(line, tmp_path):
    from PIL import Image

    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "questions.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"Line 1 of .*questions.jsonl needs '(image|question)' as a text"):
        draw_samples(str(tmp_path), 1, 1, 0)
