"""The samples of all tasks as one more task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenprune.evals.config.points import Point
from tokenprune.evals.io.rows import Costs, SampleRow

ALL_TASKS = "all"


def pool_tasks(
    points: list[Point], rows: Mapping[str, Sequence[SampleRow]]
) -> tuple[list[Point], dict[str, list[SampleRow]]]:
    """With several tasks of a model, a further task `all` that holds the samples of all of them, for the points that
    have answers to each; nothing with one task."""
    tasks: dict[str, set[str]] = {}
    counts: dict[str, int] = {}
    for point in points:
        tasks.setdefault(point.model, set()).add(point.task)
        whole = replace(point, task=ALL_TASKS)
        counts[whole.key] = counts.get(whole.key, 0) + 1
    pooled: dict[str, list[SampleRow]] = {}
    wholes: dict[str, Point] = {}
    for point in points:
        whole = replace(point, task=ALL_TASKS)
        if not 2 <= len(tasks[point.model]) == counts[whole.key]:
            continue
        wholes[whole.key] = whole
        answers = pooled.setdefault(whole.key, [])
        for row in rows[point.key]:
            # two tasks may number their samples alike
            answers.append({**row, "point": whole.key, "sample_id": f"{point.task}:{row['sample_id']}"})
    return list(wholes.values()), pooled


def pooled_note(pooled: Sequence[Point], points: Sequence[Point], rows: Mapping[str, Sequence[SampleRow]]) -> list[str]:
    """How the tasks weigh in `all`, where they differ in size: a sentence for each model.

    Args:
        pooled: points of the task `all`.
        points, rows: those of the single tasks, see `pool_tasks`.
    """
    notes = []
    for model in dict.fromkeys(point.model for point in pooled):
        counts = {point.task: len(rows[point.key]) for point in points if point.model == model}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{count} of {Path(task).stem}" for task, count in counts.items())
            notes.append(
                f"In the task all of {Path(model).name}, accuracies and tokens weigh every sample alike ({said}), so "
                "the largest task counts most; times, FLOPs and bytes weigh every task alike."
            )
    return notes


def pool_costs(point: Point, points: list[Point], measures: Mapping[str, Costs]) -> Costs:
    """Costs of a point of the task `all`: the means over its tasks, each as heavy as any other; times, FLOPs, bytes and
    equivalent tokens alike. A median or quartile is then the mean of the tasks' medians or quartiles. Empty unless
    every task has costs, and without what one of them lacks.

    Args:
        points: those of the single tasks.
        measures: `flops`, `kv` and `times` by point key.
    """
    parts = [single.key for single in points if replace(single, task=ALL_TASKS).key == point.key]
    costs = [measures.get(key) for key in parts]
    return _mean([one for one in costs if one]) if costs and all(costs) else {}


def _mean(values: list[Any]) -> Any:
    """Of numbers; of mappings and equally long lists by entry; of booleans whether all hold. None where one is."""
    first = values[0]
    if any(value is None for value in values):
        return None
    if isinstance(first, dict):
        shared = [name for name in first if all(name in value for value in values)]
        return {name: _mean([value[name] for value in values]) for name in shared}
    if isinstance(first, list):
        same = len({len(value) for value in values}) == 1
        return [_mean(list(column)) for column in zip(*values)] if same else None
    return all(values) if isinstance(first, bool) else sum(values) / len(values)
