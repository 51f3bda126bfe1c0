"""Times and FLOPs of points, kept as rows. A failure here costs no answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, cast

from tokenprune.evals.config.points import Point
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.evaluation.batching import read_batch
from tokenprune.evals.evaluation.evaluate import AskedSamples
from tokenprune.evals.evaluation.fingerprint import costs_fingerprint
from tokenprune.evals.evaluation.retry import failure_of, release_memory
from tokenprune.evals.io.digest import digest
from tokenprune.evals.io.row_store import RowStore
from tokenprune.evals.io.rows import Costs, CostsRow, FlopsCosts
from tokenprune.evals.models.load import LoadedModel
from tokenprune.evals.profiling.hardware import clocked_on
from tokenprune.evals.tasks.task import Sample, Task

MEASURE_KEY = ("settings", "point", "measure")
COSTS = ("kv", "times", "flops")
"""Keys of `Costs`."""


def way_of(config: RunConfig) -> str:
    """A digest of how costs are taken, by this code; it reads sources, so ask once for all points."""
    return digest([asdict(config.measure), costs_fingerprint()])


def measure_key(way: str, settings: str, point: Point, machine: str) -> tuple[str, str, str]:
    """Key of a point's row of costs.

    Args:
        way: see `way_of`; costs that other code counted are another row.
        machine: digest of what `machine.clocked_on` says; times of another machine are another row.
    """
    return settings, point.key, f"{way}.{machine}"


def measure(
    config: RunConfig,
    loaded: LoadedModel,
    task: Task,
    points: list[Point],
    store: RowStore[CostsRow],
    settings: str,
    on_progress: Callable[[str], None] = lambda label: None,
) -> str:
    """Measure every point that the store, keyed by `MEASURE_KEY`, has no finished row of by this machine. One that
    raises gets a row with its `error`.

    Returns:
        The machine, see `measure_key`.
    """
    from tokenprune.evals.profiling.flops import measure_flops
    from tokenprune.evals.profiling.timing import measure_times

    where = clocked_on(loaded.model)
    machine, way = digest(where), way_of(config)
    samples: list[Sample] | None = None
    unread = 0
    for point in points:
        key = measure_key(way, settings, point, machine)
        if key not in store:
            row: dict[str, Any] = {**dict(zip(MEASURE_KEY, key, strict=True)), "machine": where}
            failure = None
            try:
                if samples is None:
                    samples, unread = pictured(task, config.measure.samples)
                if samples:
                    row.update(measure_times(loaded, point, samples, config.measure, config.seed))
                    row["flops"] = measure_flops(loaded, point, samples, config.seed, config.measure.flops)
                    row["notes"] = []
                else:
                    row["notes"] = [f"There are no times and FLOPs on {task.name}: none of its samples has a picture."]
            except Exception as error:
                failure = failure_of(error)
            if failure is not None:
                release_memory(failure)
                row.update(failure.as_dict())
            if samples or failure is not None or not unread:
                store.append([cast(CostsRow, row)])  # else the pictures may be there the next time
        on_progress(point.label)
    return machine


def pictured(task: Task, wanted: int) -> tuple[list[Sample], int]:
    """The first samples that can be read and have a picture (a text alone costs the same pruned), and how many could
    not be read on the way."""
    pictured: list[Sample] = []
    unread = 0
    for place in range(task.size):
        batch = read_batch(task, place, place + 1)
        unread += len(batch.unread)
        pictured += [sample for sample in batch.samples if sample.visuals]
        if len(pictured) >= wanted:
            break
    return pictured[:wanted], unread


def read_costs(
    config: RunConfig,
    points: list[Point],
    answered: dict[tuple[str, str], AskedSamples],
    store: RowStore[CostsRow],
    machines: dict[str, str],
) -> tuple[dict[str, Costs], list[str]]:
    """`kv`, `times` and `flops` by point key, and what a reader of them must know.

    Args:
        machines: by model, which machine measured it, see `measure_key`; it may be another one than this.
    """
    from tokenprune.evals.profiling.flops import disagreements

    costs: dict[str, Costs] = {}
    notes: list[str] = []
    counted: dict[str, dict[str, FlopsCosts]] = {}
    way = way_of(config)
    for point in points:
        settings = answered[point.model, point.task].settings
        row = store.get(measure_key(way, settings, point, machines.get(point.model, "")))
        if row is None or "error" in row:
            why = "" if row is None else f": {row.get('error')} ({row.get('raised_at')})"
            notes.append(f"Times and FLOPs of {point.label} on {point.task} are missing{why}. They are measured again "
                         "when the run is started again.")  # fmt: skip
        else:
            notes += row.get("notes", [])
            costs[point.key] = cast(Costs, {name: value for name, value in row.items() if name in COSTS})
            if flops := costs[point.key].get("flops"):
                counted.setdefault(f"{point.model} on {point.task}", {})[point.label] = flops
    for of, by_label in counted.items():
        notes += disagreements(of, by_label)
    return costs, list(dict.fromkeys(notes))
