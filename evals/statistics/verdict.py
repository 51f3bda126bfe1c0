"""Whether a difference is one: the only place that says "better", "worse" or "not told apart".

Two conditions, both needed: the exact test's p-value, corrected for all tests of its table, is below 0.05; and there
are at least `LEAST_SAMPLES` samples. Everything that words a comparison asks `verdict`.
"""

from __future__ import annotations

from dataclasses import dataclass

LEVEL = 0.05
"""Of the corrected p-value."""
LEAST_SAMPLES = 100
"""Fewer samples never tell two methods apart.

Where the two differ on a quarter of the samples, 100 show a difference of about 15 points with 80 percent power, and
the percentile interval of a mean still holds the truth nearly 95 times in 100. With fewer, what passes the test is
mostly a difference that chance has made larger than it is, and one odd picture moves an accuracy by more than a point.
"""


@dataclass(frozen=True)
class Verdict:
    """What may be said of a difference.

    Attributes:
        kind: "better", "worse", "alike" (enough samples, not told apart), "few" (not enough samples), or "none"
            (nothing to compare with).
        sentence: the same for a reader.
    """

    kind: str
    sentence: str

    @property
    def told_apart(self) -> bool:
        """Whether the two differ."""
        return self.kind in ("better", "worse")


NO_CONTROL = Verdict("none", "no control measured at this cost")


def verdict(difference: float | None, p: float | None, n: int | None, needed: int | None = None) -> Verdict:
    """The verdict on a paired difference.

    Args:
        difference: of the means, this minus the other; None where there is nothing to compare with.
        p: two-sided p-value of the exact test, corrected for all tests that are made together.
        n: samples behind it.
        needed: samples that would show such a difference, see `significance.samples_needed`.
    """
    if difference is None or p is None or n is None:
        return NO_CONTROL
    if n < LEAST_SAMPLES:
        return Verdict("few", f"not enough samples (needs about {max(LEAST_SAMPLES, needed or 0)})")
    if p < LEVEL and difference:
        return Verdict("better", "better") if difference > 0 else Verdict("worse", "worse")
    more = f" (needs about {needed} samples)" if needed is not None and needed > n else ""
    return Verdict("alike", f"not told apart{more}")
