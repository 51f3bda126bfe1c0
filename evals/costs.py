"""Times and FLOPs of points, kept as rows, and pictures of what they keep. A failure here costs no answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from tokenprune.budget import budget_size
from tokenprune.evals.answering import Answered
from tokenprune.evals.config import NONE, Point, RunConfig, digest
from tokenprune.evals.failing import failure_of, release_memory
from tokenprune.evals.files import DiskRefuses, replaced
from tokenprune.evals.models import LoadedModel
from tokenprune.evals.store import RowStore
from tokenprune.evals.tasks import Task, drawn_samples

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
                samples = list(task.load(0, min(config.measure.samples, task.size)))
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


def draw(
    config: RunConfig, loaded: LoadedModel, task: Task, points: list[Point], store: RowStore, answered: Answered
) -> tuple[list[Record], list[str]]:
    """Overlays of a few samples at one budget: PNG files with what to write under them, and what went wrong."""
    from tokenprune.evals.overlay import draw_kept, seen_views

    budgets = [point.keep for point in points if point.keep is not None]
    if not config.overlays.samples or not budgets:
        return [], []
    keep: Any = config.overlays.keep if config.overlays.keep in budgets else min(budgets, key=budget_size)
    drawn = [point for point in points if point.method == NONE or point.keep == keep]
    target = config.folder / "overlays"
    pictures: list[Record] = []
    notes: list[str] = []
    for number in drawn_samples(task, config.overlays.samples, config.limit):
        try:
            sample = next(task.load(number, number + 1))
            inputs = dict(loaded.inputs([sample.question], [sample.image]))
            views = seen_views(loaded, inputs, sample.image)
            for point in drawn:
                row = store.get((answered.settings, point.key, sample.sample_id))
                if row is None or row["kept"] is None:
                    continue
                name = f"{task.name}-{sample.sample_id}-{point.label}.png".replace("/", "_").replace(":", "_")
                target.mkdir(exist_ok=True)
                with replaced(target / name) as partial:
                    draw_kept(views, point, row["kept"]).save(partial, optimize=True)
                where = {"file": target / name, "model": point.model, "task": point.task}
                pictures.append({**where, "series": point.series, "keep": keep, **row})
        except DiskRefuses:
            raise
        except Exception as error:
            failure = failure_of(error)
            notes.append(f"Sample {number} of {task.name} was not drawn: {failure.error} ({failure.raised_at}).")
    return pictures, notes
