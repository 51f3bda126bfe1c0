"""Samples to tune on: pictures and questions, drawn by a seed; answers where there are any and somebody asks."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenprune.evals.io.atomic_files import read_lines
from tokenprune.evals.io.picture_reader import read_frames, read_picture
from tokenprune.evals.pocket.catalog import refuse_test_only
from tokenprune.evals.tasks.load import check_task, load_task, task_names

QUESTIONS = "questions.jsonl"
"""The file of a folder of pictures: a line `{"image": "name.png", "question": "..."}` for each sample, and an "answer"
where one is known."""


@dataclass(frozen=True)
class SelectionRequest:
    """A picture, a question, and the answer (or accepted ones) where that is known."""

    sample_id: str
    question: str
    image: Any
    answer: Any = None


def check_data(data: str) -> None:
    """Raise if `data` is neither a task nor a folder with questions; reads no pictures."""
    folder = Path(data).expanduser()
    if not folder.is_dir():
        check_task(data)
        refuse_test_only(data, "to tune on")
    elif not (folder / QUESTIONS).is_file():
        raise FileNotFoundError(
            f"The folder {data} holds no {QUESTIONS}; write one with a line like "
            '{"image": "name.png", "question": "What is this?"} for each sample.'
        )


def _candidates(data: str, scenes: int, seed: int) -> Iterator[SelectionRequest]:
    """Samples in a shuffled order that depends on the seed only."""
    draw = random.Random(seed)
    folder = Path(data).expanduser()
    if folder.is_dir():
        lines = read_lines(folder / QUESTIONS)
        for number in draw.sample(range(len(lines)), len(lines)):
            line = lines[number]
            for name in ("image", "question"):
                if not isinstance(line.get(name), str):
                    raise ValueError(
                        f"Line {number + 1} of {folder / QUESTIONS} needs {name!r} as a text, got {line.get(name)!r}."
                    )
            picture = read_picture(folder / line["image"])
            yield SelectionRequest(str(number), str(line["question"]), picture, line.get("answer"))
    elif data in task_names():
        rows: dict[str, list[Any]] = {}
        suite, _, family = data.partition(":")
        for row in _VALIDATION[suite](family, scenes):
            if family in ("", row["family"]):
                rows.setdefault(row["scene_id"], []).append(row)
        for rows_of_scene in rows.values():  # scenes come at random already; one question about each
            row = draw.choice(rows_of_scene)
            yield SelectionRequest(row["sample_id"], row["question"], row["image"](), row["answer"])
    else:
        task = load_task(data)
        for number in draw.sample(range(task.size), task.size):
            sample = next(task.load(number, number + 1))
            yield SelectionRequest(sample.sample_id, sample.question, sample.image, sample.answer)


def _square_scenes(family: str, scenes: int) -> Iterator[dict[str, Any]]:
    from tokenprune.evals.pocket import suite

    rows: Any = suite.load("val", scenes)
    for row in rows:
        yield {**row, "image": partial(read_picture, row["image"])}


def _mixed_scenes(family: str, scenes: int) -> Iterator[dict[str, Any]]:
    from tokenprune.evals.pocket import mixed_suite as suite

    # as in the test split, every second one a clip
    clips = {"": (scenes + 1) // 2, "video": scenes}.get(family, 0)
    for row in suite.load_validation(scenes - clips, clips):
        yield {**row, "image": partial(suite.decode, row["image"])}


_VALIDATION: dict[str, Callable[[str, int], Iterator[dict[str, Any]]]] = {
    "pocket": _square_scenes, "pocket-mixed": _mixed_scenes,
}  # fmt: skip
"""By suite, rows of its validation split; `image` decodes the picture or clip."""


def _hash(image: Any) -> str:
    """The same for equal pictures, equal videos, or several of them."""
    shown = image if isinstance(image, tuple) else (image,)
    frames = [frame for one in shown for frame in read_frames(one if isinstance(one, list) else [one])]
    return hashlib.sha256(b"".join(frame.tobytes() for frame in frames)).hexdigest()


def draw_samples(
    data: str, samples: int, held_out: int, seed: int
) -> tuple[list[SelectionRequest], list[SelectionRequest]]:
    """Samples with pictures to tune on and held-out ones, no picture in both.

    Raises:
        ValueError: the data has not enough of them.
    """
    first: list[SelectionRequest] = []
    others: list[SelectionRequest] = []
    seen: set[str] = set()
    for asked in _candidates(data, samples + held_out, seed):
        if isinstance(asked.image, tuple) and not asked.image:
            continue  # a text alone: nothing to prune
        picture = _hash(asked.image)
        if len(first) < samples:
            first.append(asked)
            seen.add(picture)
        elif picture not in seen:
            others.append(asked)
        if len(others) == held_out:
            return first, others
    raise ValueError(
        f"{data} gives {len(first)} sample(s) to tune on and {len(others)} held-out one(s) with other pictures; "
        f"{samples} and {held_out} were asked for. Lower --samples or --held-out."
    )
