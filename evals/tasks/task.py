"""What a model is asked: samples, and when an answer is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

LMMS = "lmms:"  # what names of lmms-eval's tasks begin with


@dataclass
class Sample:
    """One question on one picture or video.

    Attributes:
        sample_id: unique within its task.
        image: the picture, the frames of a video (a list), or several of those (a tuple); see `chat_template.one_turn`.
        answer: the reference, or a list of accepted ones.
        family: what accuracy is also reported by.
        boxes: what suffices for the answer, each (x0, y0, x1, y1) in fractions 0..1 of the image; None if not known.
    """

    sample_id: str
    family: str
    question: str
    answer: Any
    image: Image | list[Image] | tuple[Image | list[Image], ...]
    boxes: list[list[float]] | None = None

    @property
    def visuals(self) -> list[Image | list[Image]]:
        """Its pictures and videos, in order; [] for a text alone."""
        return list(self.image) if isinstance(self.image, tuple) else [self.image]

    @property
    def frames(self) -> list[Image]:
        """Its pictures, and the frames of its videos, in order."""
        return [frame for one in self.visuals for frame in (one if isinstance(one, list) else [one])]


@dataclass
class Task:
    """A set of samples and a rule for right answers.

    Attributes:
        size: how many samples there are.
        load: yields the samples `start..stop` in the task's own order; images are decoded as they are asked for.
        score: (prediction, answer) -> 1.0 for right, 0.0 for wrong, or something between.
        max_new_tokens: length of an answer.
        families: the families in the order in which tables show them; () means as they come.
        has_boxes: whether samples know their boxes, which the oracle needs.
        fingerprint: changes with the questions, the data or the rule for right answers; answers to another task are not
            reused.
    """

    name: str
    size: int
    load: Callable[[int, int], Iterator[Sample]] = field(repr=False)
    score: Callable[[str, Any], float] = field(repr=False)
    max_new_tokens: int = 16
    families: tuple[str, ...] = ()
    has_boxes: bool = False
    fingerprint: str = ""

    def count(self, limit: int | None) -> int:
        """Samples that a run with `limit` sees: the first `limit` of them."""
        return self.size if limit is None else min(limit, self.size)

    def mark(self, sample: Sample, prediction: str) -> float:
        """The score of an answer to `sample`."""
        return self.score(prediction, sample.answer)

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Further metrics by name, in the task's own units, of all answers of one point; most tasks have none.

        Args:
            rows: with `sample_id` and `prediction`.
        """
        return {}


def drawn_samples(task: Task, wanted: int, limit: int | None) -> list[int]:
    """Places of the `wanted` samples of a run that get a picture.

    Where rows go round the families, one more than a round apart: another picture and another family each time.
    """
    count = task.count(limit)
    step = len(task.families) + 1 if len(task.families) > 1 else 1
    if step * (wanted - 1) >= count:
        step = 1
    return list(range(0, min(count, step * wanted), step))
