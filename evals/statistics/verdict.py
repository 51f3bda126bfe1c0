"""The one place that says better, worse or not told apart; tables, pages and sentences ask here.

A verdict takes a test of the same samples, its p-value corrected for all that are compared together (Holm), below 5
percent, and at least `LEAST` samples. Below that an accuracy is known to ten points at best (half the 95 percent
interval of 50 percent of 100 samples is 9.8), and what a test finds in so few says more of the samples than of the
methods.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LEAST = 100
"""Samples below which nothing is said."""
LEVEL = 0.05

BETTER, WORSE, ALIKE, FEW, UNKNOWN = "better", "worse", "alike", "few", "unknown"
KINDS = (BETTER, WORSE, ALIKE, FEW, UNKNOWN)


@dataclass(frozen=True)
class Verdict:
    """What may be said.

    Attributes:
        kind: "better", "worse", "alike" (not told apart), "few" (not enough samples) or "unknown" (no comparison).
        needed: samples that it takes, about, where there are too few.
    """

    kind: str
    needed: int | None = None

    @property
    def told_apart(self) -> bool:
        """Whether it is better or worse."""
        return self.kind in (BETTER, WORSE)

    def sentence(self, other: str) -> str:
        """In words, for example "better than random"."""
        if self.kind == FEW:
            return f"not enough samples (needs about {self.needed:,})".replace(",", "\u202f")
        if self.kind == UNKNOWN:
            return f"no {other} measured at this cost"
        words = {
            BETTER: "better than",
            WORSE: "worse than",
            ALIKE: "not told apart from",
        }
        return f"{words[self.kind]} {other}"


def verdict(difference: float | None, corrected: float | None, n: int, needed: int | None = None) -> Verdict:
    """What may be said of a difference.

    Args:
        difference: of two accuracies over the same samples; None where there is no comparison.
        corrected: p-value, corrected for all that are compared together; None where there is no test.
        n: samples.
        needed: samples with which a difference like this one would be found, where that is known.
    """
    if difference is None or corrected is None:
        return Verdict(UNKNOWN)
    if n < LEAST:
        return Verdict(FEW, max(LEAST, needed or 0))
    if corrected >= LEVEL or difference == 0:
        return Verdict(ALIKE)
    return Verdict(BETTER if difference > 0 else WORSE)


def grouped(verdicts: Iterable[tuple[str, Verdict]]) -> dict[str, list[str]]:
    """Names by kind of verdict, in the order given."""
    groups: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name, said in verdicts:
        groups[said.kind].append(name)
    return groups
