"""The paired difference of two runs, or of two points of them, over the samples that both answered."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenprune.evals.config.points import NONE
from tokenprune.evals.io.rows import AnsweredRow, SampleRow
from tokenprune.evals.results.records import ResultRecord
from tokenprune.evals.results.run_folder import FinishedRun, point_of, read_run
from tokenprune.evals.results.scores import answered
from tokenprune.evals.results.unlike import unlike
from tokenprune.evals.statistics.significance import Comparison, compare_paired, holm
from tokenprune.registry import near

OVERALL = "overall"


@dataclass
class Difference:
    """Two points over their common samples.

    Attributes:
        task: the task of both.
        first, second: labels.
        accuracies: of the two, per family and overall, over the common samples.
        families: the comparison of each question family, then `overall`; A minus B.
        only_first, only_second: samples that only one of the two answered.
        holm: overall p-value corrected for all pairs that were asked for together.
        notes: sentences on what else the two runs differ in.
    """

    task: str
    first: str
    second: str
    accuracies: dict[str, tuple[float, float]]
    families: dict[str, Comparison]
    only_first: int
    only_second: int
    holm: float | None = None
    notes: list[str] = field(default_factory=list)


def compare(first: str, second: str, method: str | None = None, seed: int = 0) -> list[Difference]:
    """A minus B, for every pair of points that the two have in common.

    Args:
        first, second: a run folder, or one of its points: `runs/x:holov@64`.
        method: compare only this series, at the budgets that both runs have.

    Raises:
        FileNotFoundError, ValueError: no finished run there, no such point, no task in common, no sample in common, or
            equally named samples that hold different questions.
    """
    a, b = _read(first), _read(second)
    pairs = _pairs(a, b, method)
    differences = [difference(a[0].rows[x["point"]], b[0].rows[y["point"]], x, y, seed) for x, y in pairs]
    for each, adjusted in zip(differences, holm([each.families[OVERALL].p for each in differences]), strict=True):
        each.holm = adjusted if len(differences) > 1 else None
        each.notes = unlike([a[0], b[0]])
    return differences


def difference(
    first: list[SampleRow], second: list[SampleRow], x: ResultRecord, y: ResultRecord, seed: int
) -> Difference:
    """The comparison of the rows of two points, see `compare`; `x` and `y` are their records."""
    ones = {row["sample_id"]: row for row in answered(first)}
    others = {row["sample_id"]: row for row in answered(second)}
    common = [name for name in ones if name in others]
    if not common:
        raise ValueError(
            f"{x['label']} and {y['label']} have no sample of {x['task']} in common: {len(ones)} and {len(others)} "
            f"samples, such as {_example(ones)} and {_example(others)}."
        )
    for name in common:
        if (ones[name]["question"], ones[name]["answer"]) != (others[name]["question"], others[name]["answer"]):
            raise ValueError(
                f"Sample {name} of {x['task']} is {ones[name]['question']!r} in one run and "
                f"{others[name]['question']!r} in the other, expecting {ones[name]['answer']!r} and "
                f"{others[name]['answer']!r}: these runs are not over the same data."
            )
    groups: dict[str, list[str]] = {}
    for name in common:
        groups.setdefault(ones[name]["family"], []).append(name)
    groups = {**(groups if len(groups) > 1 else {}), OVERALL: common}
    scores = {
        family: ([float(ones[name]["correct"]) for name in names], [float(others[name]["correct"]) for name in names])
        for family, names in groups.items()
    }
    return Difference(
        task=x["task"],
        first=x["label"],
        second=y["label"],
        accuracies={family: (sum(p) / len(p), sum(q) / len(q)) for family, (p, q) in scores.items()},
        families={family: compare_paired(p, q, seed) for family, (p, q) in scores.items()},
        only_first=len(ones) - len(common),
        only_second=len(others) - len(common),
    )


def _example(rows: dict[str, AnsweredRow]) -> str:
    return repr(next(iter(rows), None))


def _read(text: str) -> tuple[FinishedRun, str | None]:
    """`runs/x` or `runs/x:holov@64`, to the run and the label."""
    if os.path.isdir(text):
        return read_run(text), None
    folder, colon, label = text.rpartition(":")
    while colon and not os.path.isdir(folder):  # a label may hold colons: {at: layer:9}
        folder, colon, more = folder.rpartition(":")
        label = f"{more}:{label}"
    if not colon:
        raise FileNotFoundError(f"There is no run folder {text}. Write runs/NAME or runs/NAME:holov@64.")
    run = read_run(folder)
    labels = list(dict.fromkeys(record["label"] for record in _points(run)))
    label = NONE if label == "unpruned" else label
    # as it is called, or with all of its options
    label = next((r["label"] for r in _points(run) if label == point_of(r).written), label)
    if label not in labels:
        raise ValueError(f"{folder} has no point {label!r}.{near(label, labels)} It has: {', '.join(labels)}.")
    return run, label


def _points(run: FinishedRun) -> list[ResultRecord]:
    return [record for record in run.records if record["point"] in run.rows]


def _pairs(
    a: tuple[FinishedRun, str | None], b: tuple[FinishedRun, str | None], method: str | None
) -> list[tuple[ResultRecord, ResultRecord]]:
    sides = []
    for run, label in (a, b):
        side = [record for record in _points(run) if label is None or record["label"] == label]
        if method is not None:
            known = list(dict.fromkeys(record["series"] for record in side))
            side = [record for record in side if record["series"] == method]
            if not side:
                raise ValueError(
                    f"{run.folder} has no method {method!r}.{near(method, known)} It has: {', '.join(known)}."
                )
        sides.append(side)
    tasks = [list(dict.fromkeys(record["task"] for record in side)) for side in sides]
    if not set(tasks[0]) & set(tasks[1]):
        raise ValueError(
            f"The two have no task in common: {', '.join(tasks[0])} in {a[0].folder}, {', '.join(tasks[1])} in "
            f"{b[0].folder}. A paired difference needs the same samples."
        )
    _one_model(a[0], sides[0])
    _one_model(b[0], sides[1])
    # a point that one side names stands against the namesake of the other, or against the one that it names
    named = a[1] is not None and b[1] is not None
    pairs = [
        (x, y) for x in sides[0] for y in sides[1] if x["task"] == y["task"] and (named or x["label"] == y["label"])
    ]
    if not pairs:
        labels = [", ".join(dict.fromkeys(record["label"] for record in side)) for side in sides]
        raise ValueError(
            f"No point is in both: {labels[0]} in {a[0].folder}, {labels[1]} in {b[0].folder}. Name two: "
            f"{a[0].folder}:{sides[0][0]['label']} {b[0].folder}:{sides[1][0]['label']}."
        )
    return pairs


def _one_model(run: FinishedRun, records: Sequence[ResultRecord]) -> None:
    models = list(dict.fromkeys(record["model"] for record in records))
    if len(models) > 1:
        raise ValueError(
            f"{run.folder} holds several models, {', '.join(models)}; a comparison takes one on either side. Make a "
            "run of each."
        )
