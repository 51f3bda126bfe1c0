"""What a task makes of an answer."""

from __future__ import annotations

from typing import Any

from tokenprune.evals.evaluation.retry import failure_of
from tokenprune.evals.tasks.task import Sample, Task


def scored(task: Task, sample: Sample, text: str) -> dict[str, Any]:
    """The score as a row has it, or why there is none."""
    try:
        return {"correct": task.mark(sample, text)}
    except Exception as error:
        return {"correct": None, **failure_of(error).as_dict()}
