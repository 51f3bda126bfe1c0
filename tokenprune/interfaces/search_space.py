"""What a method declares so that `tokenprune tune` can search its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones if `low` is an int.

    Attributes:
        start: what the search tries first, the shipped value; None means none.
    """

    low: float
    high: float
    start: float | None = None


@dataclass(frozen=True)
class Choice:
    """One of some values; the first is the shipped one, which the search tries first."""

    values: Sequence[Any]

    @property
    def start(self) -> Any:
        """The shipped value."""
        return self.values[0]
