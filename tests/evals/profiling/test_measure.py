"""Rows of costs: what they are filed under, and what a sample that cannot be measured costs the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from _runs import UNTIMED, config

from tokenprune.evals.config.measure import Measure
from tokenprune.evals.config.points import Point
from tokenprune.evals.evaluation.applied_method import check_points
from tokenprune.evals.evaluation.evaluate import AskedSamples
from tokenprune.evals.io.row_store import RowStore
from tokenprune.evals.profiling import flops
from tokenprune.evals.profiling.flops import measure_flops
from tokenprune.evals.profiling.measure import MEASURE_KEY, measure, read_costs
from tokenprune.evals.results.over_tasks import pool_costs, pool_tasks, pooled_note
from tokenprune.evals.results.summary import flat_costs
from tokenprune.evals.tasks.load import load_task
from tokenprune.evals.tasks.task import Task

POINTS = [Point("m", "t", "none", None), Point("m", "t", "uniform", 9)]


@pytest.fixture
def store(tmp_path: Path) -> RowStore:
    return RowStore(tmp_path / "measures.jsonl", MEASURE_KEY)


def measured(store: RowStore, tiny, task: Task, how: Measure = UNTIMED) -> tuple[dict, list[str]]:
    asked = config(store.path.parent, "m", "t", measure=how)
    machine = measure(asked, tiny, task, POINTS, store, "settings")
    return read_costs(asked, POINTS, {("m", "t"): AskedSamples("settings")}, store, {"m": machine})


def test_times_of_another_machine_are_not_taken_for_this_ones(store, tiny, tiny_task, monkeypatch):
    task = load_task(tiny_task)
    measured(store, tiny, task)
    measured(store, tiny, task)
    assert len(store) == 2
    monkeypatch.setattr("torch.get_num_threads", lambda: 512)
    assert len(measured(store, tiny, task)[0]) == 2 and len(store) == 4
    assert [row["machine"]["threads"] == 512 for row in store.rows()] == [False, False, True, True]
    assert all(row["machine"]["device"] == "cpu" and row["machine"]["torch"] for row in store.rows())


def test_a_prompt_is_counted_once_a_point(store, tiny, tiny_task, monkeypatch):
    calls, once = [], flops.count_once
    monkeypatch.setattr(flops, "count_once", lambda *given: calls.append(1) or once(*given))
    found, _ = measured(store, tiny, load_task(tiny_task), Measure(samples=2, times=False))
    assert len(calls) == 2 * len(POINTS) and all(one["flops"]["agree"] for one in found.values())


def test_points_whose_counts_differ_are_said_in_one_sentence(store, tiny, tiny_task, monkeypatch):
    def counts_twice(*given):
        return {part: 2 * value for part, value in once(*given).items()}

    once = flops.count_once
    monkeypatch.setattr(flops, "count_once", lambda *given: counts_twice(*given))
    found, (note,) = measured(store, tiny, load_task(tiny_task), Measure(samples=1, times=False))
    assert found[POINTS[1].key]["flops"]["agree"] is False
    assert note.startswith("Analytic FLOPs of m on t differ from measured ones by more than 1% at 2 of 2 points: ")
    assert note.endswith("layers -50.0% at none, uniform@9.") and "prefill -50.0%" in note


def test_points_that_differ_alike_are_said_together():
    by_label = {"a@9": {"prefill": 0.0}, "b@9": {"selection": -1.0}, "b@4": {"selection": -1.0}, "c": {"decode": 0.02}}
    counted = {label: {"difference": one} for label, one in by_label.items()} | {"none": {"difference": None}}
    assert flops.disagreements("m on t", counted) == [
        "Analytic FLOPs of m on t differ from measured ones by more than 1% at 3 of 4 points: "
        "selection -100.0% at b@9, b@4; decode +2.0% at c."
    ]


def test_costs_of_all_tasks_are_their_mean_or_not_there():
    from _fake_runs import _measures

    tasks = [Point("m", task, "uniform", 64) for task in ("long", "short")]
    rows = {point.key: [{"sample_id": "0", "point": point.key}] for point in tasks}
    (whole,), _ = pool_tasks(tasks, rows)
    one, other = _measures(tasks[0]), _measures(Point("m", "short", "uniform", 16))
    other["times"].pop("decode")
    both = {tasks[0].key: one, tasks[1].key: other}
    tokens = {"visual_tokens": 576, "kept_tokens": 40}
    found = flat_costs({**tokens, **pool_costs(whole, tasks, both)})
    parts = [flat_costs({**tokens, **costs}) for costs in (one, other)]
    for name in ("equivalent_tokens", "gflops_total", "kv_bytes", "prefill_ms", "prefill_ms_q25"):
        assert found[name] == pytest.approx((parts[0][name] + parts[1][name]) / 2), name
    assert found["flops_agree"] is True and found["decode_ms"] is None
    one["flops"]["measured"] = None
    assert flat_costs({**tokens, **pool_costs(whole, tasks, both)})["gflops_total_measured"] is None
    many = {**rows, tasks[0].key: [*rows[tasks[0].key], {"sample_id": "1", "point": tasks[0].key}]}
    (note,) = pooled_note([whole], tasks, many)
    assert "(2 of long, 1 of short), so the largest task counts most" in note and not pooled_note([whole], tasks, rows)
    for missing in ({tasks[0].key: one}, {tasks[0].key: one, tasks[1].key: {}}):
        assert pool_costs(whole, tasks, missing) == {}


def broken_at(task: Task, *places: int, text_only: bool = False) -> Task:
    """The task, whose samples at `places` cannot be read; or without its pictures."""

    def load(start: int, stop: int):
        for place, sample in enumerate(task.load(start, stop), start=start):
            if place in places:
                raise OSError("image file is truncated")
            yield replace(sample, image=()) if text_only else sample

    return replace(task, load=load, size=6)


def test_a_text_only_task_has_no_costs_and_says_so(store, tiny, tiny_task):
    task = broken_at(load_task(tiny_task), text_only=True)
    found, notes = measured(store, tiny, task)
    assert list(found.values()) == [{}, {}] and notes == [
        "There are no times and FLOPs on toy: none of its samples has a picture."
    ]
    tokens = {"visual_tokens": 0, "kept_tokens": 0}
    assert set(flat_costs({**tokens, **found[POINTS[1].key]}).values()) == {None, 0}


def test_a_sample_that_cannot_be_read_takes_no_costs_with_it(store, tiny, tiny_task):
    found, notes = measured(store, tiny, broken_at(load_task(tiny_task), 0, 2), Measure(samples=3, times=False))
    assert not notes and [one["kv"]["measured"] > 0 for one in found.values()] == [True, True]
    assert [one["flops"]["agree"] for one in found.values()] == [True, True]


def test_an_unreadable_first_sample_stops_no_run(tiny, tiny_task):
    check_points(tiny, broken_at(load_task(tiny_task), 0), POINTS, 0)
    with pytest.raises(ValueError, match="takes pictures, and one of its samples is a video"):
        frames = [next(load_task(tiny_task).load(0, 1)).image] * 4
        film = replace(next(load_task(tiny_task).load(0, 1)), image=frames)
        check_points(tiny, replace(load_task(tiny_task), load=lambda *places: iter([film])), POINTS, 0)


def test_costs_come_once_pictures_that_could_not_be_read_are_there(store, tiny, tiny_task):
    task = load_task(tiny_task)
    found, notes = measured(store, tiny, broken_at(task, *range(6)), Measure(samples=1, times=False))
    assert not found and all("are measured again when the run is started again" in note for note in notes)
    found, notes = measured(store, tiny, broken_at(task), Measure(samples=1, times=False))
    assert not notes and [one["kv"]["measured"] > 0 for one in found.values()] == [True, True]


def test_costs_that_other_code_counted_are_counted_anew(store, tiny, tiny_task, monkeypatch):
    task = load_task(tiny_task)
    measured(store, tiny, task)
    monkeypatch.setattr("tokenprune.evals.profiling.measure.costs_fingerprint", lambda: "other code")
    assert len(measured(store, tiny, task)[0]) == 2 and len(store) == 4


def test_what_is_not_modelled_agrees_with_nothing(tiny, tiny_task, monkeypatch):
    """FLOPs without a number are no FLOPs that were checked, and a part that was checked still says so."""
    import dataclasses

    point, samples = Point("tiny", "toy", "random", 9), list(load_task(tiny_task).load(0, 1))
    known = tiny.adapter.cost_shape()
    nothing = dataclasses.replace(known, by_layer=(None,) * known.layers, projector=None, vocab=None)
    monkeypatch.setattr(tiny.adapter, "cost_shape", lambda: nothing)
    found = measure_flops(tiny, point, samples)
    assert found["analytic"]["prefill"] is None and found["agree"] is None
    assert "layers" not in found["difference"] and found["difference"]["vision"] == pytest.approx(0, abs=0.01)
    monkeypatch.setattr(tiny.adapter, "cost_shape", lambda: dataclasses.replace(nothing, vision_mlp=1))
    assert measure_flops(tiny, point, samples)["agree"] is False


@pytest.mark.parametrize(("method", "counted"), [("random", True), ("random+shortv(layers=[1])", False)])
def test_the_papers_formula_knows_no_layers_that_are_passed_by(method, counted, tiny, tiny_task):
    found = measure_flops(tiny, Point("tiny", "toy", method, 9), list(load_task(tiny_task).load(0, 1)))
    assert found["agree"] and (found["paper"] is not None) == counted
