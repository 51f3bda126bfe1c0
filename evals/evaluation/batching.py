"""The samples of a task in batches, cut at fixed places, so that several processes can share them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tokenprune.evals.evaluation.retry import Failure, failure_of
from tokenprune.evals.tasks.task import Sample, Task


@dataclass(frozen=True)
class Share:
    """Every `of`-th batch, from number `rank` on."""

    rank: int = 0
    of: int = 1


WHOLE = Share()


@dataclass
class Batch:
    """Neighbouring samples of a task.

    Attributes:
        samples: those that could be read.
        unread: why others could not be, under the ids that stand for them (their places).
        ids: of all of them, by their place in the task.
    """

    samples: list[Sample]
    unread: dict[str, Failure]
    ids: dict[int, str]


def read_batch(task: Task, start: int, stop: int) -> Batch:
    """The samples `start..stop`; one that cannot be read keeps no other one from being read."""
    batch = Batch([], {}, {})
    try:
        read: list[Sample | Failure] = list(task.load(start, stop))
    except Exception:
        read = [_read_one(task, place) for place in range(start, stop)]
    for place, found in enumerate(read, start=start):
        if isinstance(found, Failure):
            batch.unread[f"#{place}"] = found
        else:
            batch.samples.append(found)
        batch.ids[place] = f"#{place}" if isinstance(found, Failure) else found.sample_id
    return batch


def _read_one(task: Task, place: int) -> Sample | Failure:
    try:
        return next(iter(task.load(place, place + 1)))
    except Exception as error:
        return failure_of(error)


def batches(task: Task, limit: int | None, size: int, share: Share) -> Iterator[Batch]:
    """The batches of a share, in order."""
    count = task.count(limit)
    for start in range(share.rank * size, count, share.of * size):
        yield read_batch(task, start, min(start + size, count))
