"""Who stands where: with several seeds of random, with different numbers of samples, with too few."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _fake_runs import fake_run

from tokenprune.evals.config.points import NONE, Point
from tokenprune.evals.report.findings import findings
from tokenprune.evals.report.markdown import write_markdown
from tokenprune.evals.report.merge import merge
from tokenprune.evals.results.equal_cost import Panel
from tokenprune.evals.results.over_seeds import over_seeds, seed_tables
from tokenprune.evals.results.run_folder import read_run
from tokenprune.evals.results.standings import costs_to_show, recommended
from tokenprune.evals.results.summary import summarise, table_rows

SAMPLES = 120


def answers(point: Point, right: float) -> list[dict]:
    rng = np.random.default_rng(list(point.key.encode()))
    kept = {NONE: 576, "fastv": 32}.get(point.method, point.keep)  # fastv's mean lies between two budgets of random
    return [
        {
            "sample_id": f"s{i}", "family": "f", "correct": float(rng.random() < right), "visual_tokens": 576,
            "kept_tokens": float(kept),  # type: ignore[arg-type]
        }
        for i in range(SAMPLES)
    ]  # fmt: skip


def with_seeds(*seeds: int | None) -> tuple[list[Point], dict[str, list[dict]]]:
    points = [Point("m", "t", NONE, None)]
    points += [Point("m", "t", "random", keep, (), True, seed) for keep in (64, 16) for seed in seeds]
    points += [Point("m", "t", "holov", keep) for keep in (64, 16)]
    points += [Point("m", "t", "fastv", 16)]
    points += [Point("m", "t", "todre", 16, (("pivot", "random"),), seed=seed) for seed in seeds]
    right = {NONE: 0.95, "random": 0.4, "holov": 0.7, "fastv": 0.6, "todre": 0.5}
    return points, {point.key: answers(point, right[point.method]) for point in points}


def test_several_seeds_of_random_are_still_the_control() -> None:
    """Each seed is a series of its own; a point is held against that of its seed, else against the first."""
    points, rows = with_seeds(3, 5)
    records = summarise(points, rows, {}, 0)
    found = {record["label"]: record for record in records}
    for asked, seed in (("holov@16", 3), ("fastv@16", 3), ("todre(pivot=random)@16 seed 3", 3),
                        ("todre(pivot=random)@16 seed 5", 5)):  # fmt: skip
        # as if the run had had this seed only
        alone = [p for p in points if p.method in (NONE, "holov", "fastv") or p.seed == seed]
        expected = {r["label"]: r for r in summarise(alone, {p.key: rows[p.key] for p in alone}, {}, 0)}[asked]
        mine = dict(found[asked]["equal_cost"]["tokens"]["random"])
        assert mine.pop("holm") >= expected["equal_cost"]["tokens"]["random"]["holm"]  # more tests in the table
        assert mine.items() <= expected["equal_cost"]["tokens"]["random"].items(), asked
    assert found["holov@16"]["area"]["tokens"]["vs_random"] is not None
    for seed in (3, 5):
        drawn = found[f"random@16 seed {seed}"]
        assert "equal_cost" not in drawn and drawn["area"]["tokens"]["vs_random"] is None
    assert [r["at_tokens_vs_random_verdict"] for r in table_rows(records) if r["method"] == "holov"][-1] == "better"
    assert [cost for _, cost in costs_to_show(Panel(records, rows))] == [64.0, 16.0]  # type: ignore[arg-type]


def test_further_seeds_of_a_method_do_not_compete_with_it() -> None:
    points, rows = with_seeds(3, 5)
    records = summarise(points, rows, {}, 0)
    names = Panel(records, rows).competing()
    assert names == ["random seed 3", "holov", "fastv", "todre(pivot=random) seed 3"]
    cards = findings(records, rows)
    assert "holov" in cards and "seed 5" not in cards


def test_over_seeds_a_method_is_compared_at_its_own_cost() -> None:
    """Asked for 64 tokens it holds 128 and is as good as random there; at 64 random is 20 points worse."""
    points = [Point("m", "t", NONE, None)]
    points += [Point("m", "t", "random", keep, (), True, seed) for keep in (64, 256) for seed in (0, 1)]
    points += [Point("m", "t", "todre", 64, (("pivot", "random"),), seed=seed) for seed in (0, 1)]
    held = {NONE: (576, 200), "todre": (128, 120), "random": (64, 80)}
    rows = {}
    for point in points:
        kept, right = (256, 160) if point.keep == 256 else held[point.method]
        rows[point.key] = [
            {
                "sample_id": f"s{i}", "family": "f", "correct": float(i < right), "visual_tokens": 576,
                "kept_tokens": float(kept),
            }
            for i in range(200)
        ]  # fmt: skip
    records = summarise(points, rows, {}, 0)
    (mine,) = [row for row in over_seeds(records) if row["method"] == "todre"]
    assert mine["vs_random"] == pytest.approx(0.2) and mine["at_tokens_vs_random"] == pytest.approx(0)
    (table,) = seed_tables(records)
    assert [str(cell) for cell in table.columns[-1].cells] == ["", "", "+0.0"] and table.columns[-1].header[-1] == "*"


def graded(run, right) -> None:
    rows = pq.read_table(run / "samples.parquet").to_pylist()
    for row in rows:
        row["correct"] = float(right(row["method"], int(row["sample_id"][1:])))
    pq.write_table(pa.Table.from_pylist(rows), run / "samples.parquet")


@pytest.fixture
def unequal(tmp_path):
    """One run of 120 samples and one of 400, of which the further ones are hard: vtc_cls answers all of the 120, holov
    90 percent."""
    a = fake_run(tmp_path / "a", ("none", "random", "holov"), (64,), 120, 0)
    b = fake_run(tmp_path / "b", ("none", "random", "vtc_cls"), (64,), 400, 0)
    graded(a, lambda method, i: {"random": i % 2 == 0, "holov": i % 10 != 0}.get(method, True))
    graded(b, lambda method, i: {"random": i % 2 == 0, "vtc_cls": i < 120}.get(method, True))
    return [read_run(a), read_run(b)]


def test_the_best_of_two_runs_is_that_over_their_common_samples(unequal, tmp_path) -> None:
    merged = merge(unequal)
    (row,) = recommended(Panel(merged.records, merged.rows), ["holov", "vtc_cls"])
    assert (row["best"], row["recommended"], row["accuracy"]) == ("vtc_cls", ["vtc_cls"], 1.0)
    card = findings(merged.records, merged.rows)
    assert "vtc_cls <span>100.0 %" in card and "of 120 samples" in card and "told apart from all 2 others" in card
    text = write_markdown(tmp_path / "board.md", unequal).read_text()
    at_cost = text[text.index("### Accuracy at given mean tokens") : text.index("### Every point")]
    assert "| vtc_cls |  | 100.0 (" in at_cost and "| holov |  | 90.0 (" in at_cost
    assert "the accuracy of a point is over its own" in text


def test_one_method_with_few_samples_is_not_recommended(tmp_path) -> None:
    run = read_run(fake_run(tmp_path / "few", ("none", "random", "holov"), (64,), 20, 0))
    (row,) = recommended(Panel(run.records, run.rows), ["holov"])
    assert row["enough"] is False and row["recommended"] == []


def test_no_control_is_no_sentence_that_none_lost(tmp_path) -> None:
    run = read_run(fake_run(tmp_path / "bare", ("none", "holov"), (64,), 120, 0))
    text = write_markdown(tmp_path / "bare.md", [run]).read_text()
    assert "none loses" not in text
    assert "Neither random nor downsampling was measured around the cost of any method." in text


def test_what_runs_differ_in_is_said(unequal, tmp_path) -> None:
    assert not any("differ in" in note for note in merge(unequal).notes)
    unequal[1].origin["config"]["dtype"] = "bfloat16"
    unequal[1].origin["hardware"]["cpu"] = "another"
    (note,) = [note for note in merge(unequal).notes if "differ in" in note]
    assert note.startswith("These runs differ in dtype (float32 in a, bfloat16 in b); machine (") and "another" in note
