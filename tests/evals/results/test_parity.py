"""Published numbers beside ours: a run of known numbers, a run of the trained pocket model, the shipped tables."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from tokenprune.api import adapter_for, plan_for
from tokenprune.cli import main
from tokenprune.evals.config.measure import Measure, Overlays
from tokenprune.evals.config.points import Point
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.config.sweep_file import packaged_configs, read_config
from tokenprune.evals.config.targets import Target, read_target
from tokenprune.evals.evaluation.applied_method import method_of
from tokenprune.evals.results.parity import compare, parity_lines, read_run, read_targets, write_parity
from tokenprune.evals.results.summary import summarise, write_results
from tokenprune.evals.statistics.verdict import LEAST
from tokenprune.evals.sweep.sweep import run

PAPERS = sorted(name for name in packaged_configs() if name.startswith("papers/"))
MADE_UP = "made up for this test"


def target(**changes) -> Target:
    return read_target(0, {"method": "uniform", "keep": 9, "task": "t", "value": 50.0, "source": MADE_UP, **changes})


@pytest.fixture(scope="module")
def records() -> list[dict]:
    """A run of 40 samples: unpruned right on 30 of them, uniform@9 on 20."""
    points = [Point("m", "t", "none", None), Point("m", "t", "uniform", 9), Point("m", "t", "uniform", 9, (("a", 1),))]
    rights = dict(zip(points, (30, 20, 10)))
    rows = {
        point.key: [
            {
                "settings": "s", "point": point.key, "sample_id": str(i), "family": "all", "question": "?",
                "answer": "yes", "prediction": "", "correct": float(i < rights[point]), "visual_tokens": 36,
                "kept_tokens": 9, "kept": None,
            }
            for i in range(40)
        ]
        for point in points
    }  # fmt: skip
    config = RunConfig("x", "m", ["t"], ["uniform"], [9])
    found = summarise(points, rows, {}, config.seed)
    found[1]["metrics"] = {"exact_match": 0.5, "f1": 0.4, "perception": 1000.0, "cognition": 200.0}
    return found


def test_ours_theirs_difference_and_inside(records):
    found = compare(records, [target(value=52.0, unpruned=80.0), target(value=90.0), target(value=5.0)])
    close, above, below = found
    assert (close.ours, close.difference, close.n) == (50.0, -2.0, 40)
    overall = records[1]["overall"]
    assert (close.low, close.high) == (100 * overall["ci_low"], 100 * overall["ci_high"])
    assert close.low < 50 < close.high
    assert [one.inside for one in found] == [True, False, False]
    assert (close.ours_relative, close.theirs_relative) == (pytest.approx(20 / 30), pytest.approx(0.65))
    assert above.theirs_relative is None and below.difference == 45.0


def test_the_ends_of_the_interval_are_inside(records):
    overall = records[1]["overall"]
    edges = [100 * overall["ci_low"], 100 * overall["ci_high"]]
    assert [one.inside for one in compare(records, [target(value=edge) for edge in edges])] == [True, True]
    out = [edges[0] - 1e-6, edges[1] + 1e-6]
    assert [one.inside for one in compare(records, [target(value=edge) for edge in out])] == [False, False]


def test_only_the_same_point_is_compared(records):
    others = [
        {"keep": 8},
        {"keep": "avg9"},
        {"task": "u"},
        {"method": "vtc_cls"},
        {"options": {"a": 2}},
        {"model": "n"},
    ]
    assert all(one.ours is None for one in compare(records, [target(**other) for other in others]))
    (with_options,) = compare(records, [target(options={"a": 1}, model="m")])
    assert with_options.ours == 25.0


def test_metrics_of_the_task(records):
    sums = {"metric": ["perception", "cognition"], "unit": "points", "value": 1100}
    exact, f1, total, missing = compare(
        records, [target(metric="exact_match"), target(metric="f1"), target(**sums), target(metric="bleu")]
    )
    assert exact.inside is True, "a metric that is the mean score has its interval"
    assert (f1.ours, f1.inside) == (40.0, None), "of another metric no interval is known"
    assert (total.ours, total.difference, total.inside) == (1200.0, 100.0, None)
    assert missing.ours is None
    said = parity_lines([exact, f1, total, missing])
    assert said[0] == "1 of 1 published numbers lie inside our intervals."
    assert "2 more have no interval" in said[1] and "1 of 4 targets have no number" in said[2]
    assert said[-1].startswith("Published numbers held against few samples, 40 of ours: 1.")
    enough = [replace(exact, n=LEAST), replace(f1, n=3)]  # of another metric there is no interval to be wide
    assert not any("few samples" in line for line in parity_lines(enough))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"valu": 3}, "unknown key 'valu'. Did you mean 'value'"),
        ({"value": "85.6"}, "value of targets[0] must be a number, got '85.6'"),
        ({"unpruned": "high"}, "unpruned of targets[0] must be a number"),
        ({"unit": "percents"}, "Did you mean 'percent'"),
        ({"method": "holow"}, "no method called 'holow'. Did you mean 'holov'"),
        ({"options": [1]}, "needs a mapping where it has options"),
    ],
)
def test_wrong_targets_are_refused(change, says):
    with pytest.raises((ValueError, KeyError)) as caught:
        target(**change)
    assert says in str(caught.value)
    with pytest.raises(ValueError, match=r"targets\[3\] lacks the key 'source'"):
        read_target(3, {"method": "uniform", "keep": 9, "task": "t", "value": 1})


def test_a_file_of_targets_beside_a_run(records, tmp_path, capsys):
    """The command reads targets of another file, prints the table and writes every target down."""
    rows = {record["point"]: [] for record in records}
    rows[records[0]["point"]] = [{"settings": "s", "answer": "a", "sample_id": "0"}]
    write_results(tmp_path, records, rows, {"config": {"targets": []}})
    assert main(["parity", str(tmp_path)]) == 2
    assert "names no targets" in capsys.readouterr().err
    file = tmp_path / "published.yaml"
    entry = {"method": "uniform", "keep": 9, "task": "t", "value": 52.0, "source": MADE_UP, "evidence": "unverified"}
    file.write_text(yaml.safe_dump({"targets": [entry, {**entry, "keep": 4}]}))
    assert main(["parity", str(tmp_path), "--targets", str(file)]) == 0
    said = capsys.readouterr().out
    assert "uniform@9" in said and "-2.0" in said and "(unverified)" in said and "1 of 1 published numbers" in said
    with (tmp_path / "parity.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [(row["keep"], row["ours"], row["theirs"], row["inside"]) for row in table] == [
        ("9", "50", "52", "True"), ("4", "", "52", ""),
    ]  # fmt: skip
    assert main(["parity", str(tmp_path / "nowhere")]) == 2
    assert "give the folder of a finished run" in capsys.readouterr().err


@pytest.mark.pocket
def test_a_real_run_with_made_up_targets(tmp_path):
    """pocket-llava on 14 samples: the comparison says of its numbers what a hand count of the answers says."""
    entry = {"method": "uniform", "keep": 64, "task": "pocket", "source": MADE_UP, "value": 0.0}
    targets = [read_target(i, {**entry, "value": value}) for i, value in enumerate((0.0, 100.0))]
    quick = Measure(samples=1, times=False, flops=False, decode_tokens=0)
    config = RunConfig(
        "made-up", "pocket-llava", ["pocket"], ["uniform"], [64], limit=14, batch_size=14, references=False,
        output=str(tmp_path), measure=quick, overlays=Overlays(samples=0), targets=targets,
    )  # fmt: skip
    run(config, Console(quiet=True))
    records, named = read_run(tmp_path)
    assert named == targets
    low, high = compare(records, named)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    right = sum(row["correct"] for row in rows if row["point"].endswith("|uniform@64"))
    assert 0 < right < 14, "the test needs a run that is neither all right nor all wrong"
    assert low.ours == high.ours == pytest.approx(100 * right / 14)
    assert (low.inside, high.inside) == (False, False)
    exact = read_target(0, {**entry, "value": 100 * right / 14})
    assert compare(records, [exact])[0].inside is True
    assert write_parity(tmp_path / "parity.csv", [low, high]).read_text().count(MADE_UP) == 2


# The shipped tables


@pytest.fixture
def anywhere(monkeypatch):
    """Tables name tasks of lmms-eval, which need not be installed to read them."""
    monkeypatch.setattr("tokenprune.evals.config.run_config.check_task", lambda name: None)


@pytest.mark.parametrize("name", PAPERS)
def test_tables_name_points_of_their_sweep(name, anywhere):
    """A target that no point answers is a slip of the pen, unless its task is one that the sweep leaves out."""
    config = read_config(name)
    assert len(config.targets) >= 30
    points = [(point.method, point.keep, dict(point.options)) for point in config.points()]
    for one in config.targets:
        assert (one.method, one.keep, one.options) in points, one
        assert one.task in config.all_tasks or one.task == "lmms:mmbench_en_dev", one
        assert one.source and one.family
        # some tables of 2026 could be read without their unpruned row
        assert one.unpruned or one.family in ("TOPS", "ERA"), one
        assert one.unpruned is None or 0 < one.value <= 1.02 * one.unpruned, one
        assert (one.unit == "points") == (one.task == "lmms:mme")


@pytest.mark.parametrize("name", PAPERS)
def test_no_number_stands_twice(name, anywhere):
    seen = [(one.method, one.keep, one.task, one.family, one.source) for one in read_config(name).targets]
    assert len(seen) == len(set(seen))


def _seven_billion(name: str):
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
    )

    with torch.device("meta"):
        if name.endswith("llava_1_5_7b"):
            return LlavaForConditionalGeneration(LlavaConfig())
        if name.endswith("llava_next_7b"):
            return LlavaNextForConditionalGeneration(LlavaNextConfig())
        text = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                "intermediate_size": 18944}  # fmt: skip
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text))


@pytest.mark.parametrize("name", PAPERS)
def test_every_point_of_a_table_can_be_planned(name, anywhere):
    """On a model of the real depth, without weights: averages that the layers cannot hold would be refused here."""
    adapter = adapter_for(_seven_billion(name))
    for point in read_config(name).points():
        if point.method != "none":
            assert plan_for(adapter, method_of(point, 0)), point.label


def test_targets_of_a_packaged_table():
    holov = [one for one in read_targets("papers/llava_1_5_7b") if one.method == "holov" and one.keep == 192]
    assert {(one.task, one.value) for one in holov if one.family == "A"} >= {("lmms:pope", 85.6), ("lmms:gqa", 59.0)}
    assert {(one.task, one.value) for one in holov if one.family == "B"} >= {("lmms:pope", 85.0), ("lmms:gqa", 58.6)}
    assert Path(packaged_configs()["papers/llava_1_5_7b"]).name == "llava_1_5_7b.yaml"
