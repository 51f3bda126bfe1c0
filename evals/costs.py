"""Times and FLOPs of points, kept as rows. A failure here costs no answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from typing import Any

from tokenprune.evals.answering import Answered
from tokenprune.evals.config import Point, RunConfig, digest
from tokenprune.evals.failing import failure_of, release_memory
from tokenprune.evals.models import LoadedModel
from tokenprune.evals.store import RowStore
from tokenprune.evals.tasks import Task

Record = dict[str, Any]
MEASURE_KEY = ("settings", "point", "measure")


def measure_key(config: RunConfig, settings: str, point: Point) -> tuple[str, str, str]:
    """Key of a point's row of costs."""
    return settings, point.key, digest(asdict(config.measure))


def measure(
    config: RunConfig,
    loaded: LoadedModel,
    task: Task,
    points: list[Point],
    store: RowStore,
    settings: str,
    on_progress: Callable[[str], None] = lambda label: None,
) -> None:
    """Measure every point that the store, keyed by `MEASURE_KEY`, has no finished row of. One that raises gets a row
    with its `error`."""
    from tokenprune.evals.flops import measure_flops
    from tokenprune.evals.timing import measure_times

    plain: dict[str, dict[str, float]] = {}
    for point in points:
        key = measure_key(config, settings, point)
        if key not in store:
            row: Record = dict(zip(MEASURE_KEY, key, strict=True))
            failure = None
            try:
                seen = (sample for sample in task.load(0, task.size) if sample.visuals)  # a text costs the same pruned
                samples = list(islice(seen, config.measure.samples))
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", UserWarning)
                    row.update(measure_times(loaded, point, samples, config.measure, config.seed))
                    row["flops"] = measure_flops(loaded, point, samples, config.seed, config.measure.flops, plain)
                row["notes"] = [str(warning.message) for warning in caught if "FLOPs" in str(warning.message)]
            except Exception as error:
                failure = failure_of(error)
            if failure is not None:
                release_memory(failure)
                row.update(failure.as_dict())
            store.append([row])
        on_progress(point.label)


def read_costs(
    config: RunConfig, points: list[Point], answered: dict[tuple[str, str], Answered], store: RowStore
) -> tuple[dict[str, Record], list[str]]:
    """`kv`, `times` and `flops` by point key, and what a reader of them must know."""
    found: dict[str, Record] = {}
    notes: list[str] = []
    for point in points:
        row = store.get(measure_key(config, answered[point.model, point.task].settings, point))
        if row is None or "error" in row:
            why = "" if row is None else f": {row['error']} ({row['raised_at']})"
            notes.append(f"Times and FLOPs of {point.label} on {point.task} are missing{why}. They are measured again "
                         "when the run is started again.")  # fmt: skip
        else:
            notes += row["notes"]
            found[point.key] = {name: row[name] for name in ("kv", "times", "flops")}
    return found, notes
