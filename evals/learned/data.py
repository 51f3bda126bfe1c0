"""Questions to train on: those of a suite's training split, or of a task of the user's own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

from tokenprune.evals.io.picture_reader import read_picture
from tokenprune.evals.pocket.catalog import SUITES
from tokenprune.evals.tasks.load import load_task
from tokenprune.evals.tasks.task import Sample, Task

_SCENES = 32  # drawn at a time


def draw_training(data: str, samples: int, held_out: int, seed: int) -> tuple[list[Sample], list[Sample], Task]:
    """Samples to train on, held-out ones about other pictures, and the task that says when an answer is right.

    Of a pocket suite these are scenes of its training split, from a place that the seed says, all questions about each.

    Raises:
        ValueError: the data has not enough of them.
    """
    task = load_task(data)
    if data.partition(":")[0] in SUITES:
        drawn = _pocket(data, seed)
        train = list(islice(drawn, samples))
        scenes = {_scene(sample) for sample in train}
        others = list(islice((sample for sample in drawn if _scene(sample) not in scenes), held_out))
        return train, others, task
    if task.size < samples + held_out:
        raise ValueError(
            f"{data} has {task.size} questions; {samples} to train on and {held_out} held-out ones were asked for. "
            "Lower --samples or --held-out."
        )
    order = random.Random(seed).sample(range(task.size), samples + held_out)
    found = [next(task.load(number, number + 1)) for number in order]
    return found[:samples], found[samples:], task


def _scene(sample: Sample) -> str:
    return sample.sample_id.rpartition("-")[0]


def _pocket(data: str, seed: int) -> Iterator[Sample]:
    """Without end: training scenes one after another, from one that the seed says."""
    suite, _, family = data.partition(":")
    start = random.Random(seed).randrange(0, 100_000)
    while True:
        for row in _READERS[suite](start, family):
            if family in ("", row["family"]):
                yield Sample(row["sample_id"], row["family"], row["question"], row["answer"], row["picture"])
        start += _SCENES


def _square(start: int, family: str) -> Iterator[dict[str, Any]]:
    from tokenprune.evals.pocket import suite

    for row in suite.training_rows(_SCENES, start):
        yield {**row, "picture": read_picture(row["image"]["bytes"])}


def _mixed(start: int, family: str) -> Iterator[dict[str, Any]]:
    from tokenprune.evals.pocket import mixed_suite

    # as in the test split, every second one a clip
    clips = {"": _SCENES // 2, "video": _SCENES}.get(family, 0)
    for row in mixed_suite.training_rows(_SCENES - clips, clips, start):
        yield {**row, "picture": mixed_suite.decode(row["image"])}


_READERS = {"pocket": _square, "pocket-mixed": _mixed}
