"""What a task makes of an answer."""

from __future__ import annotations

from typing import Any

from tokenprune.evals.evaluation.retry import failure_of
from tokenprune.evals.tasks.task import Sample, Task


def scored(task: Task, sample: Sample, text: str) -> dict[str, Any]:
    """The score as a row has it, or why there is none."""
    try:
        score = task.mark(sample, text)
        if not 0 <= score <= 1:
            raise ValueError(
                f"{task.name} scored {score!r}. A score lies between 0 (wrong) and 1 (right), since accuracies, "
                "intervals and tests are of such; have the task divide by its largest score."
            )
        return {"correct": score}
    except Exception as error:
        return {"correct": None, **failure_of(error).as_dict()}
