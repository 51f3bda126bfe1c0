"""Several runs as one: their points side by side, and every comparison made anew over the samples they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from tokenprune.evals.config.points import Point
from tokenprune.evals.io.rows import Costs, SampleRow
from tokenprune.evals.profiling.measure import COSTS
from tokenprune.evals.results.equal_cost import compare_at_equal_cost
from tokenprune.evals.results.records import ResultRecord
from tokenprune.evals.results.run_folder import FinishedRun, point_of
from tokenprune.evals.results.summary import summarise
from tokenprune.evals.results.unlike import unlike


@dataclass
class Merged:
    """What a page shows.

    Attributes:
        title: the names of the runs.
        runs: those that were merged.
        records: one per point, see `summary.summarise`.
        rows: by point key.
        notes: sentences that a reader must know.
    """

    title: str
    runs: Sequence[FinishedRun]
    records: list[ResultRecord]
    rows: dict[str, list[SampleRow]]
    notes: list[str]


def merge(runs: Sequence[FinishedRun]) -> Merged:
    """One run as it is; several with their points side by side.

    Where runs hold the same point, the first run's is taken, and a note says so. Tests, intervals and Holm's correction
    of several runs are computed anew over the whole table, each over the samples that both sides answered; the pooled
    task `all` of the single runs is left out.

    Raises:
        ValueError: no run, or runs whose equally named samples hold different questions.
    """
    if not runs:
        raise ValueError("A report needs at least one run folder, got none.")
    notes = [note for run in runs for note in run.origin.get("notes", [])]
    if len(runs) == 1 and "vs_unpruned_p" in runs[0].records[0]["overall"]:
        if not any("equal_cost" in record for record in runs[0].records):  # of a run before there was such a thing
            compare_at_equal_cost(runs[0].records, runs[0].rows, int(runs[0].origin["config"]["seed"]))
        return Merged(runs[0].name, runs, runs[0].records, runs[0].rows, notes)
    records: dict[str, ResultRecord] = {}
    rows: dict[str, list[SampleRow]] = {}
    owners: dict[str, FinishedRun] = {}
    twice: dict[str, list[str]] = {}
    for run in runs:
        for record in run.records:
            key = record["point"]
            if key in records and key in run.rows:
                twice.setdefault(owners[key].name, []).append(record["label"])
            elif key in run.rows:
                records[key], rows[key], owners[key] = record, run.rows[key], run
    _check_questions(rows)
    notes += unlike(runs)
    notes += [
        f"{', '.join(dict.fromkeys(labels))} ran in several of these runs; shown are those of {name}."
        for name, labels in twice.items()
    ]
    counts = {task: sorted({len(rows[k]) for k, r in records.items() if r["task"] == task}) for task in _tasks(records)}
    notes += [
        f"The points on {task} were asked different numbers of samples ({', '.join(map(str, sizes))}): the accuracy of "
        "a point is over its own, so that two of them do not compare; comparisons, and accuracies at a given cost, are "
        "over the samples that all sides answered."
        for task, sizes in counts.items()
        if len(sizes) > 1
    ]
    points = _told_apart({key: point_of(record) for key, record in records.items()}, owners)
    measures = {
        # the name of a task goes the way of its costs
        key: cast(Costs, {name: value for name, value in record.items() if name in (*COSTS, "task_name")})
        for key, record in records.items()
    }
    seed = int(runs[0].origin["config"]["seed"])
    title = " + ".join(dict.fromkeys(run.name for run in runs))
    # a run's own order is unpruned, random, methods: bring that of all runs together
    order = {"none": 0, "random": 1}
    points.sort(key=lambda point: (point.model, point.task, order.get(point.method, 2)))
    return Merged(title, runs, summarise(points, rows, measures, seed), rows, notes)


def _told_apart(points: dict[str, Point], owners: dict[str, FinishedRun]) -> list[Point]:
    """The points of all runs; where files of one name hold different settings in two runs, the later one's name says
    which run it is of."""
    called: dict[tuple[str, str, str], str] = {}
    told: list[Point] = []
    for key, point in points.items():
        if called.setdefault((point.model, point.task, point.label), key) != key:
            point = replace(point, shown=f"{point.series} of {owners[key].name}")
        told.append(point)
    return told


def _tasks(records: dict[str, ResultRecord]) -> list[str]:
    return list(dict.fromkeys(record["task"] for record in records.values()))


def _check_questions(rows: dict[str, list[SampleRow]]) -> None:
    asked: dict[tuple[str, str], str] = {}
    for key, answers in rows.items():
        task = key.split("|")[1]
        for row in answers:
            known = asked.setdefault((task, row["sample_id"]), row["question"])
            if known != row["question"]:
                raise ValueError(
                    f"Sample {row['sample_id']} of {task} is {known!r} in one of the runs and {row['question']!r} in "
                    "another: these are not runs of the same data."
                )
