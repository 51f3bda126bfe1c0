"""The plan of a sweep: its estimates are the costs of real prompts; it loads no weights and writes nothing."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from _families import BUILDERS, batch_of, family
from PIL import Image
from rich.console import Console

import tokenprune
from tokenprune.api import adapter_for
from tokenprune.cli import main
from tokenprune.evals.config.measure import Measure, Overlays
from tokenprune.evals.config.points import Point
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.pocket.catalog import POCKET_FAMILIES
from tokenprune.evals.profiling.estimate import PICTURE, QUESTION, estimate, of_prompt, outline
from tokenprune.evals.sweep.dry_run import _ids, make_plan, plan_lines, plan_tables
from tokenprune.evals.sweep.sweep import run
from tokenprune.evals.tasks.load import count_samples, load_task
from tokenprune.registry import METHODS

PARTS = ("vision", "projector", "prefill", "decode")


def config(folder: Path, model: str, **changes) -> RunConfig:
    settings = {"methods": ["none", "uniform", "oracle"], "keep": [9], **changes}
    return RunConfig("plan", model, settings.pop("tasks", ["pocket:count"]), output=str(folder), **settings)


def real_costs(model, inputs, point: Point):
    """What the report of a real prompt counts."""
    with tokenprune.applied(model, point.method, point.keep) as handle:
        if any("boxes" in stage.pruner.needed_hints for stage in handle.stages):
            handle.set_hints(boxes=[[[0.1, 0.1, 0.4, 0.5]]])
        if any("frame_scores" in stage.pruner.needed_hints for stage in handle.stages):
            handle.set_hints(frame_scores=[None])
        with torch.inference_mode():
            model(**inputs)
        return handle.report()


@pytest.mark.parametrize("method", METHODS.names())
def test_estimates_are_the_costs_of_a_real_prompt(tiny, tiny_folder, method):
    """The parts that do not depend on what a method finds: equal to the last FLOP, except for methods that may keep
    fewer tokens than their budget, for which they bound it."""
    inputs = dict(tiny.inputs([QUESTION], [Image.new("RGB", PICTURE)]))
    model = outline(tiny_folder)
    for keep in (9, 0.5):
        point = Point(tiny_folder, "pocket", method, keep)
        guess, report = estimate(model, point), real_costs(tiny.model, inputs, point)
        for part in PARTS:
            counted, real = getattr(guess.flops, part), getattr(report.flops, part)
            assert counted >= real if guess.at_most else counted == real, part
            assert getattr(guess.unpruned, part) == getattr(report.flops_unpruned, part)


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in sorted(BUILDERS) for method in ("uniform", "fastv")]
    + [("llava", "random+var"), ("llava", "random+naavit"), ("qwen2_5_vl", "random+naavit")],
)
def test_estimates_hold_for_every_family(name, method):
    inputs = batch_of(name, "one_left")
    model = family(name)
    for keep in (5, 0.4):
        point = Point(name, "pocket", method, keep)
        guess, report = estimate(of_prompt(adapter_for(model), inputs), point), real_costs(model, inputs, point)
        assert guess.flops.vision == report.flops.vision
        assert guess.flops.projector == report.flops.projector
        assert guess.unpruned.prefill == report.flops_unpruned.prefill
        if method != "random+var":  # attention of an intervention's rows is computed anew, and left out
            assert guess.flops.prefill == report.flops.prefill


def test_a_seven_billion_model_is_estimated_from_its_config_alone(tmp_path, tiny):
    """The published figure of LLaVA-1.5-7B: 8.5 TFLOPs for the decoder on 641 tokens, 2 per multiply-add."""
    from transformers import LlavaConfig

    LlavaConfig(image_token_index=5, image_seq_length=576).save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings["image_processor"] |= {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    (tmp_path / "processor_config.json").write_text(json.dumps({**settings, "patch_size": 14}))
    model = outline(str(tmp_path))
    assert model.visual.num_tokens == 576
    model = dataclasses.replace(model, text=65)
    assert estimate(model, Point(str(tmp_path), "pocket", "none", None)).flops.prefill == pytest.approx(
        8.5e12, rel=0.01
    )
    averaged = estimate(model, Point(str(tmp_path), "pocket", "fastv", "avg64"))
    plain = estimate(model, Point(str(tmp_path), "pocket", "uniform", 64))
    assert averaged.flops.prefill == pytest.approx(plain.flops.prefill, rel=0.15)


@pytest.mark.parametrize("task", ["pocket:count", "pocket-mixed:video"])
def test_samples_are_counted_without_the_pictures(task):
    assert count_samples(task) == load_task(task).size


def test_samples_of_a_task_file(tiny_task, tmp_path):
    assert count_samples(tiny_task) == 60
    (tmp_path / "q.jsonl").write_text('{"question": "a"}\n{"question": "b"}\n')
    (tmp_path / "task.yaml").write_text("data: q.jsonl\n")
    assert count_samples(str(tmp_path / "task.yaml")) == 2
    (tmp_path / "task.yaml").write_text("data: owner/name\n")
    assert count_samples(str(tmp_path / "task.yaml")) is None
    assert count_samples("lmms:pope") is None


def test_a_plan_loads_no_weights_and_writes_nothing(tmp_path, tiny_folder, monkeypatch):
    from transformers import AutoModelForImageTextToText

    def forbidden(*args, **kwargs):
        raise AssertionError("a plan must not load weights")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", forbidden)
    monkeypatch.setattr("datasets.load_dataset", forbidden)
    plan = make_plan(config(tmp_path / "none", tiny_folder, limit=7))
    assert not (tmp_path / "none").exists()
    assert [one.point.label for one in plan.points] == ["none", "random@9", "uniform@9", "oracle@9"]
    assert {one.samples for one in plan.points} == {7} and {one.done for one in plan.points} == {0}
    assert [one.needs for one in plan.points] == [(), (), (), ("boxes",)]
    each = [one.samples * one.estimate.flops.total for one in plan.points]
    assert plan.flops == sum(each) > 0


def test_limits_do_not_exceed_a_task(tmp_path, tiny_folder):
    plan = make_plan(config(tmp_path, tiny_folder, tasks=["pocket", "pocket:count"], limit=10**6))
    assert {(one.point.task, one.samples) for one in plan.points} == {
        ("pocket", count_samples("pocket")),
        ("pocket:count", count_samples("pocket:count")),
    }
    assert count_samples("pocket") == sum(count_samples(f"pocket:{family}") for family in POCKET_FAMILIES)


def test_tasks_with_the_same_plan_share_a_table(tmp_path, tiny_folder):
    tasks = ["pocket:count", "pocket:read"]
    plan = make_plan(config(tmp_path, tiny_folder, tasks=tasks))
    (table,) = plan_tables(plan)
    assert "pocket:count, pocket:read" in str(table.title)
    samples = list(table.columns[2].cells)
    assert samples == [str(sum(map(count_samples, tasks)))] * 4
    listed = [{"method": "vtc_cls", "keep": 4, "task": "pocket:read"}]
    assert len(plan_tables(make_plan(config(tmp_path, tiny_folder, tasks=tasks, listed=listed)))) == 2


def test_a_hub_model_that_is_not_here_is_not_estimated(tmp_path):
    plan = make_plan(config(tmp_path, "nobody/nothing", tasks=["pocket", "lmms:pope"]))
    assert plan.flops is None and all(one.estimate is None for one in plan.points)
    assert plan.points[0].needs == ("a hub model",)
    assert "lmms-eval" in plan.points[-1].needs
    said = "\n".join(plan_lines(plan))
    assert "nobody/nothing could not be estimated: the config of nobody/nothing is not in the local cache." in said
    assert "How many samples they have is known once their data is read: lmms:pope." in said


def test_a_started_run_shows_how_much_is_done(tmp_path, tiny_folder, tiny_task):
    quick = Measure(samples=1, times=False, flops=False, decode_tokens=0)
    settings = {"tasks": [tiny_task], "methods": ["uniform"], "measure": quick, "overlays": Overlays(samples=0)}
    run(config(tmp_path, tiny_folder, limit=6, **settings), Console(quiet=True))
    file = tmp_path / "samples.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    # as a kill leaves it: the last answers are missing, and one line is torn
    file.write_text("".join(lines[:-2]) + lines[-1][:20])
    before = file.read_bytes()
    plan = make_plan(config(tmp_path, tiny_folder, limit=8, **settings))
    assert sum(one.done for one in plan.points) == len(lines) - 2
    assert {one.samples for one in plan.points} == {8}
    assert "1 lines in the run folder are torn" in "\n".join(plan_lines(plan))
    assert "no JSON rows" not in "\n".join(plan_lines(plan))
    assert file.read_bytes() == before
    file.write_text("{oops\n" + "".join(lines))
    notes = "\n".join(plan_lines(make_plan(config(tmp_path, tiny_folder, limit=8, **settings))))
    assert "1 lines in the run folder are no JSON rows; the run refuses them" in notes and "torn" not in notes
    file.write_bytes(before)
    # another process of the run may have answered the rest
    (tmp_path / "samples.rank1.jsonl").write_text(lines[-1] + lines[0])
    assert sum(one.done for one in make_plan(config(tmp_path, tiny_folder, **settings)).points) == len(lines) - 1
    (tmp_path / "samples.rank1.jsonl").unlink()
    # an earlier run may have gone further than this one is to go
    lower = make_plan(config(tmp_path, tiny_folder, limit=2, **settings))
    assert {(one.samples, one.done) for one in lower.points} == {(2, 2)} and not lower.notes[1:]
    # rows of another seed answer for nothing
    other = make_plan(config(tmp_path, tiny_folder, limit=8, seed=3, **settings))
    assert {one.done for one in other.points} == {0}
    assert f"{len(lines) - 2} rows of the run folder belong to other points" in "\n".join(plan_lines(other))


def test_what_cannot_run_is_said_and_fails(tmp_path, tiny_folder, capsys):
    """The tiny decoder is too short for this average; only the model's depths tell."""
    path = tmp_path / "sweep.yaml"
    settings = {"model": tiny_folder, "tasks": ["pocket:count"], "methods": ["fastv"], "keep": ["avg1"], "limit": 3}
    path.write_text(yaml.safe_dump({**settings, "references": False, "output": str(tmp_path / "out")}))
    assert main(["sweep", str(path), "--dry-run"]) == 1
    said = capsys.readouterr().out
    assert "Cannot run: fastv@avg1 on tiny. fastv cannot hold an average of 1 tokens" in said
    assert not (tmp_path / "out").exists()


def test_the_command_prints_a_plan(tmp_path, tiny_folder, capsys):
    path = tmp_path / "sweep.yaml"
    settings = {"model": tiny_folder, "tasks": ["pocket:count"], "methods": ["uniform"], "keep": [9, 4], "limit": 3}
    path.write_text(yaml.safe_dump({**settings, "output": str(tmp_path / "out")}))
    assert main(["sweep", str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "tiny on pocket:count" in said and "uniform@4" in said and "5 points, 15 answers, 0 of them done" in said
    assert "TFLOPs to the first tokens" in said


def test_rows_of_a_task_whose_data_are_not_read_count_whatever_its_data():
    point = Point("m", "hub.yaml", "none", None)
    rows = {("base.one", point.key): {"a"}, ("base.two", point.key): {"b"}, ("other.one", point.key): {"c"}}
    assert _ids(rows, point, "base.", "one") == {"a"} and _ids(rows, point, "base.", "three") == set()
    assert _ids(rows, point, "base.", None) == {"a", "b"} and _ids(rows, point, None, "one") == set()


def test_a_plan_of_what_is_not_modelled_says_so_and_adds_nothing_up(tmp_path, tiny_folder):
    plan = make_plan(config(tmp_path / "run", str(tiny_folder)))
    nothing = dataclasses.replace(plan.points[0].estimate.flops, vision=None)
    points = [
        dataclasses.replace(one, estimate=dataclasses.replace(one.estimate, flops=nothing, unpruned=nothing))
        for one in plan.points
        if one.estimate is not None
    ]
    partly = dataclasses.replace(plan, points=points)
    console = Console(width=200, record=True, file=io.StringIO())
    for table in plan_tables(partly):
        console.print(table)
    assert console.export_text().count("not modelled") == len({one.point.label for one in points})
    assert partly.flops is None and not any("In all" in line for line in plan_lines(partly))
