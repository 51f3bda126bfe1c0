"""Which prompt is asked where nobody names one, and what must be said of a picture of one's own."""

from __future__ import annotations

from pathlib import Path

from tokenprune.evals.io.picture_reader import read_extent
from tokenprune.evals.models.load import pocket_names
from tokenprune.evals.tasks.load import default_task, load_task
from tokenprune.evals.tasks.task import Sample, Task

SIGNS = {"pocket": 4, "pocket-mixed": 20}
"""By suite, a sign that its pocket model reads right unpruned, and that some methods make it misread."""


def suite_sample(model: str, number: int | None) -> tuple[Task, Sample]:
    """A sample of the suite that a model is asked about, with its task; None takes a sign (`SIGNS`).

    Raises:
        ValueError: the suite has no sample of that number.
    """
    task = load_task(default_task(model))
    number = SIGNS[task.name] if number is None else number
    if not 0 <= number < task.size:
        raise ValueError(f"--sample must be in 0 to {task.size - 1}, got {number}.")
    return task, next(task.load(number, number + 1))


def own_picture_note(model: str) -> str | None:
    """What a reader must know of an answer about a picture that is not of the suite; None for models of any size."""
    if model not in pocket_names():
        return None
    return (
        f"{model} is out of its depth here: it was trained on the drawn pictures and the few kinds of questions of its "
        "suite and on nothing else, so what it says of a photograph or of any other picture means nothing. What was "
        "kept and what it cost are still true. For photographs load a checkpoint that has seen some: --model "
        "llava-hf/llava-1.5-7b-hf, for example."
    )


def frames_note(source: Path | bytes, name: str) -> str | None:
    """A sentence where a file holds more pictures than the first, which is the one that is asked about; else None."""
    extent = read_extent(source)
    if extent is None or extent.count == 1:
        return None
    return f"{name} has {extent.count} {'pages' if extent.pages else 'frames'}; only the first is asked about."
