"""The pocket suites as tasks of the driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from tokenprune.evals.io.picture_reader import read_picture
from tokenprune.evals.pocket import suite
from tokenprune.evals.pocket.catalog import SUITES, suite_fingerprint
from tokenprune.evals.tasks.task import Sample, Task

FRAME = 336  # pixels: side of the square in which the suite `pocket` gives its boxes
_Rows = tuple[Any, Sequence[str], Callable[[Any], Any], float]


def pocket_task(name: str) -> Task:
    """The task of a suite, "pocket-mixed", or of one of its families, "pocket-mixed:video"."""
    suite_name, _, family = name.partition(":")
    rows, families, picture, side = _READERS[suite_name]()
    places = [i for i, family_of_sample in enumerate(families) if family in ("", family_of_sample)]

    def load(start: int, stop: int) -> Iterator[Sample]:
        for row in (rows[i] for i in places[start:stop]):
            yield Sample(
                sample_id=str(row["sample_id"]),
                family=row["family"],
                question=row["question"],
                answer=row["answer"],
                image=picture(row["image"]),
                boxes=[[value / side for value in box] for box in row["boxes"]],
            )

    def score(prediction: str, answer: Any) -> float:
        return float(suite.answer_matches(prediction, answer))

    shown = (family,) if family else SUITES[suite_name]
    made_of = suite_fingerprint(suite_name)
    if suite_name.endswith("-hallucination"):
        return _hallucination(name, [rows[i] for i in places], load, shown, made_of)
    return Task(name, len(places), load, score, 8, families=shown, has_boxes=True, fingerprint=made_of)


def _hallucination(name: str, rows: list[Any], load: Any, families: tuple[str, ...], made_of: str) -> Task:
    from tokenprune.evals.pocket.hallucination import OR
    from tokenprune.evals.tasks.hallucination_task import HallucinationTask

    def score(prediction: str, answer: Any) -> float:
        return float(any(suite.answer_matches(prediction, one) for one in str(answer).split(OR)))

    # the pictures are not kept: only what the metrics ask for
    truth = {str(row["sample_id"]): {key: row[key] for key in row if key not in ("image", "boxes")} for row in rows}
    return HallucinationTask(
        name, len(rows), load, score, 8, families=families, has_boxes=True, fingerprint=made_of, truth=truth
    )


def _square() -> _Rows:
    rows: Any = suite.load("test")
    return rows, rows["family"], read_picture, FRAME


def _mixed() -> _Rows:
    from tokenprune.evals.pocket import mixed_suite as mixed

    rows = mixed.load_rows()
    return rows, [row["family"] for row in rows], mixed.decode, 1.0


def _crowd(suite_name: str) -> _Rows:
    from tokenprune.evals.pocket import crowd

    rows = crowd.load_rows(suite_name)
    return rows, [row["family"] for row in rows], read_picture, 1.0


def _tempting(suite_name: str) -> _Rows:
    from tokenprune.evals.pocket import hallucination

    rows = hallucination.load_rows(suite_name)
    return rows, [row["family"] for row in rows], read_picture, 1.0


_READERS: dict[str, Callable[[], _Rows]] = {
    "pocket": _square, "pocket-mixed": _mixed, "pocket-crowd": partial(_crowd, "pocket-crowd"),
    "pocket-mixed-crowd": partial(_crowd, "pocket-mixed-crowd"),
    "pocket-hallucination": partial(_tempting, "pocket-hallucination"),
    "pocket-mixed-hallucination": partial(_tempting, "pocket-mixed-hallucination"),
}  # fmt: skip
