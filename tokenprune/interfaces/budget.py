"""How many visual tokens to keep; imports no torch, so that the CLI can check budgets at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenprune.interfaces.visual import Visual


class Budget:
    """How many visual tokens each image keeps.

    Args:
        keep: an int is the tokens kept of each image, a float in (0, 1] the kept fraction of its tokens, rounded to
            the nearest count (half up) and at least 1. An int above an image's count keeps all of it.

    Raises:
        ValueError: zero, negative, NaN or above 1 as a float.
        TypeError: not a number.
    """

    def __init__(self, keep: Any) -> None:
        if isinstance(keep, bool) or not isinstance(keep, Real):
            raise TypeError(f"keep must be an int (tokens per image) or a float (kept fraction), got {keep!r}.")
        if isinstance(keep, Integral):
            if keep < 1:
                raise ValueError(f"keep must be at least 1 token per image, got {int(keep)}.")
            self.keep: int | float = int(keep)
        else:
            if not 0.0 < float(keep) <= 1.0:
                raise ValueError(
                    f"keep as a float is the kept fraction and must be in (0, 1], got {keep}. "
                    "For a number of tokens pass an int."
                )
            self.keep = float(keep)

    def tokens(self, num_tokens: int) -> int:
        """k for an image of N = `num_tokens` visual tokens."""
        if isinstance(self.keep, int):
            return min(self.keep, num_tokens)
        return min(num_tokens, max(1, math.floor(self.keep * num_tokens + 0.5)))

    def pictures(self, visual: Visual) -> list[int]:
        """What each picture that the vision tower gets of an image or a video (crops, frames) keeps inside the tower:
        its share of k, in proportion to its size."""
        sizes = [rows * cols for rows, cols in visual.tower_grids]
        kept = self.tokens(visual.num_tokens)
        # crops may have padding that makes no token, so shares of all tokens would not add up to whole crops
        return sizes if kept >= visual.num_tokens else split_budget(kept, sizes)

    def __repr__(self) -> str:
        return f"{self.keep}"


def split_budget(budget: int, sizes: Sequence[int]) -> list[int]:
    """`budget` over grids of these sizes, in proportion; what rounding leaves goes to the largest remainders, the
    first of equals. Sums to min(budget, sum(sizes))."""
    total = sum(sizes)
    budget = min(budget, total)
    shares = [budget * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(budget * sizes[i] % total), i))
    for index in by_remainder[: budget - sum(shares)]:
        shares[index] += 1
    return shares


AVERAGE = "avg"
"""What a budget begins with that is meant as a mean over the decoder's layers: "avg64", "avg0.111"."""


def read_budget(text: str) -> int | float | str:
    """The budget in a text: "64" is tokens per image, "0.25" a kept fraction, "avg64" (as it is) a mean over layers.

    Raises:
        ValueError: no number.
    """
    if text.startswith(AVERAGE) and text != AVERAGE:
        return f"{AVERAGE}{Budget(read_number(text[len(AVERAGE) :].lstrip(':'))).keep}"
    return read_number(text)


def read_number(text: str) -> int | float:
    """An int or a float."""
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise ValueError(
                "A budget is a number of tokens like 64, a kept fraction like 0.25 or a mean over the decoder's layers "
                f"like avg64, got {text!r}."
            ) from None


def average_of(keep: object) -> int | float | None:
    """The mean that a budget asks for; None if it is no mean."""
    if not isinstance(keep, str) or not keep.startswith(AVERAGE):
        return None
    return read_number(keep[len(AVERAGE) :].lstrip(":"))


def budget_size(keep: int | float | str) -> float:
    """A number to sort budgets by."""
    average = average_of(keep)
    return float(keep if average is None else average)


def budget_text(keep: int | float | str) -> str:
    """A budget as people read it: a fraction that a search found has 17 digits, of which four say what it is."""
    if isinstance(keep, float):
        return f"{keep:.4g}"
    average = average_of(keep)
    return f"{AVERAGE}{average:.4g}" if isinstance(average, float) else str(keep)
