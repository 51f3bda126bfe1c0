"""What points cost where an engine cannot be measured from outside: FLOPs counted from the sizes of their prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from tokenprune.evals.config.points import NONE, Point
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.evaluation.retry import failure_of
from tokenprune.evals.io.row_store import RowStore
from tokenprune.evals.io.rows import CostsRow
from tokenprune.evals.profiling.estimate import estimate, of_prompt, unloaded
from tokenprune.evals.profiling.flops import PARTS, plus, with_total
from tokenprune.evals.profiling.measure import MEASURE_KEY, measure_key, pictured, way_of
from tokenprune.evals.tasks.task import Task

MACHINE = "sizes"
"""In the key of a row, in place of a machine."""
NOTE = (
    "vLLM answered: there are no times, no KV bytes, no measured FLOPs and no pictures of kept tokens. FLOPs of the "
    "tower, the projector and the prefill are counted from the sizes; what a method computes is not, nor is the total."
)


def count_from_sizes(
    config: RunConfig,
    model: str,
    task: Task,
    points: list[Point],
    store: RowStore[CostsRow],
    settings: str,
    on_progress: Callable[[str], None] = lambda label: None,
) -> str:
    """A row of each point that the store, keyed by `MEASURE_KEY`, has none of: the first prompts with one picture, laid
    out by the processor, through `profiling.estimate`. No weights are loaded.

    Returns:
        What stands in place of the machine in the rows' keys.
    """
    outlines: list[Any] | None = None
    way = way_of(config)
    for point in points:
        key = measure_key(way, settings, point, MACHINE)
        if key not in store:
            row: dict[str, Any] = {**dict(zip(MEASURE_KEY, key, strict=True)), "machine": {}, "notes": [NOTE]}
            try:
                outlines = _outlines(config, model, task) if outlines is None else outlines
                row["flops"] = _flops(point, outlines, config.seed)
            except Exception as error:
                row["notes"].append(f"FLOPs on {task.name} could not be counted: {failure_of(error).error}.")
            store.append([cast(CostsRow, row)])
        on_progress(point.label)
    return MACHINE


def _outlines(config: RunConfig, model: str, task: Task) -> list[Any]:
    asked, adapter = unloaded(model)
    samples, _ = pictured(task, config.measure.samples)
    if not samples:
        raise ValueError("none of its samples has a picture")
    return [of_prompt(adapter, dict(asked.inputs([sample.question], [sample.image]))) for sample in samples]


def _flops(point: Point, outlines: list[Any], seed: int) -> dict[str, Any]:
    pruned: dict[str, float | None] = dict.fromkeys(PARTS, 0.0)
    whole: dict[str, float | None] = dict.fromkeys(PARTS, 0.0)
    for outline in outlines:
        found = estimate(outline, point, seed)
        for total, counted in ((pruned, found.flops.as_dict()), (whole, found.unpruned.as_dict())):
            for part in PARTS:
                total[part] = plus(total[part], counted[part], len(outlines))
    nothing = {"paper": None, "measured": None, "difference": None, "agree": None}
    if point.method != NONE:
        pruned["selection"] = None
    return {"analytic": with_total(pruned), "unpruned": with_total(whole), **nothing}
