"""What to do when samples raise: find out which ones, and answer the others."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """An error as rows keep it.

    Attributes:
        error: its type and message.
        raised_at: file and line.
    """

    error: str
    raised_at: str

    def as_dict(self) -> dict[str, str]:
        """For a row."""
        return {"error": self.error, "raised_at": self.raised_at}


def failure_of(error: Exception) -> Failure:
    """What is kept of an error: nothing that holds on to its frames, whose tensors are what may have filled memory."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    message = " ".join(str(error).split())
    return Failure(f"{type(error).__name__}: {message[:500]}" if message else type(error).__name__, where)


def is_fatal(error: Exception) -> bool:
    """Whether the process cannot go on: after an error of the accelerator itself every later call fails too."""
    return isinstance(error, torch.AcceleratorError)


def release_memory(failure: Failure) -> None:
    """Give back what a batch left behind that failed for want of memory."""
    if any(words in failure.error for words in ("MemoryError", "OutOfMemory", "allocate memory")):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def retry_in_halves(samples: list[Any], work: Callable[[list[Any]], list[T]]) -> list[T | Failure]:
    """`work` on all samples at once; if it raises, on halves of them, down to single samples.

    So a batch that does not fit in memory is answered in smaller ones, and a sample that raises fails alone.

    Args:
        work: from samples to one result each.

    Returns:
        A result or the failure of each sample.
    """
    try:
        return list(work(samples))
    except Exception as error:
        if is_fatal(error):
            raise
        failure = failure_of(error)
    # only here the error, its frames and their tensors are gone
    release_memory(failure)
    if len(samples) == 1:
        return [failure]
    middle = (len(samples) + 1) // 2
    return retry_in_halves(samples[:middle], work) + retry_in_halves(samples[middle:], work)
