"""From the rows of a store to the samples that count: those that every point of a model and task has answered."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tokenprune.evals.config.points import Point
from tokenprune.evals.errors import UserError
from tokenprune.evals.evaluation.evaluate import AskedSamples
from tokenprune.evals.io.row_store import RowStore
from tokenprune.evals.io.rows import SampleRow


@dataclass
class Counted:
    """Rows by point key.

    Attributes:
        points: those that have answered something, in their order.
        rows: of the samples that all points of a model and task have answered, in the order of the task.
        others: rows that do not count: failed ones, and answers to samples that another point failed on.
        failed: how many samples failed.
        notes: sentences that a reader of the accuracies must know.
    """

    points: list[Point] = field(default_factory=list)
    rows: dict[str, list[SampleRow]] = field(default_factory=dict)
    others: dict[str, list[SampleRow]] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def count_rows(
    store: RowStore[SampleRow], points: list[Point], answered: dict[tuple[str, str], AskedSamples]
) -> Counted:
    """What counts of each model and task.

    An accuracy is only comparable over the same samples, so one that failed at a point is left out at all points of its
    model and task. A point without any answer is left out itself, and so is one that is not done.

    Args:
        answered: settings and sample ids by model and task.

    Raises:
        UserError: two samples share an id, or nothing is left.
    """
    counted = Counted()
    for (model, task), asked in answered.items():
        panel = [point for point in points if (point.model, point.task) == (model, task)]
        _count_task(store, panel, asked, counted, f"{Path(model).name} on {task}")
    if not counted.points:
        raise UserError("No point has answered a sample. " + " ".join(counted.notes))
    return counted


def _count_task(
    store: RowStore[SampleRow], points: list[Point], asked: AskedSamples, counted: Counted, where: str
) -> None:
    ids = [asked.ids[place] for place in sorted(asked.ids)]
    twice = [sample_id for sample_id, times in Counter(ids).items() if times > 1]
    if twice:
        raise UserError(f"The samples of a task need ids of their own; {where} has {twice[0]!r} twice.")
    finished: dict[str, dict[str, SampleRow]] = {}
    for point in points:
        rows = {i: row for i in ids if (row := store.get((asked.settings, point.key, i))) is not None}
        failures = [row for row in rows.values() if "error" in row]
        if failures:
            first = failures[0]
            counted.notes.append(
                f"{point.label} failed on {len(failures)} of {len(ids)} samples of {where}; "
                f"the first is {first['sample_id']}: {first.get('error')} ({first.get('raised_at')})."
            )
        if len(rows) < len(ids):
            counted.notes.append(
                f"{point.label} has come to {len(rows)} of {len(ids)} samples of {where}, so it is left out; start the "
                "run again to go on."
            )
        elif len(failures) == len(ids):
            counted.notes.append(f"{point.label} has answered no sample of {where}, so it is left out.")
        else:
            finished[point.key] = rows
            counted.points.append(point)
            counted.failed[point.key] = len(failures)
    common = [i for i in ids if all("error" not in rows[i] for rows in finished.values())]
    if finished and not common:
        raise UserError(f"No sample was answered by all points of {where}. " + " ".join(counted.notes))
    if len(common) < len(ids) and finished:
        counted.notes.append(
            f"Accuracies of {where} are over the {len(common)} of {len(ids)} samples that all of its points answered. "
            "Failed samples are asked again when the run is started again."
        )
    for key, rows in finished.items():
        counted.rows[key] = [rows[i] for i in common]
        counted.others[key] = [row for i, row in rows.items() if i not in set(common)]
