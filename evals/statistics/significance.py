"""Whether two methods differ on the same samples: exact McNemar, Holm's correction, and how many samples it takes.

McNemar's test looks only at the samples that the two methods answer differently: `won` that the method gets right and
its baseline wrong, `lost` the other way round. If neither is better, each such sample is a fair coin. With scores
between 0 and 1 samples differ by different amounts, and many small wins may be worth less than few large losses; there
the signs of the differences are flipped, which tests the mean that is shown. The two are one where all amounts are.

From scipy come the binomial tail and the normal quantiles, out of `scipy.special`: importing `scipy.stats` takes a
second more, and its `binomtest` 2 to 6 ms a call where `betainc` takes 4 us. Written here is what scipy does not have:
Holm's correction (its `false_discovery_control` bounds another rate; statsmodels has Holm, and is a large dependency
for ten lines) and the sample sizes of the exact McNemar test, which its `power` would simulate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, betainc, gammaln, ndtri

from tokenprune.evals.statistics.bootstrap import paired_difference

Z_TWO_SIDED_5 = float(ndtri(0.975))
"""97.5 percent quantile of the normal law: two-sided tests at 5 percent."""
Z_POWER_80 = float(ndtri(0.8))
"""80 percent quantile of the normal law."""
FLIPS = 200_000
"""Patterns of signs that are thrown where there are too many to count."""
EXACT = 1_000_000
"""Patterns that are counted at most."""


@dataclass(frozen=True)
class Comparison:
    """A method against a baseline over the same samples.

    Attributes:
        difference, low, high: mean of score minus baseline, with its 95 percent paired bootstrap interval.
        n: samples behind it.
        won, lost: samples on which the method scores higher, and lower.
        p: two-sided, exact McNemar or by flipped signs, see `sign_test`.
        needed: samples with which a difference and a discordance as observed are found with 80 percent power at
            two-sided 5 percent; None where no difference was observed.
        detectable: smallest difference that these n samples show with that power, at the observed discordance; None
            where even one-sided discordance would not do.
    """

    difference: float
    low: float
    high: float
    n: int
    won: int
    lost: int
    p: float
    needed: int | None
    detectable: float | None


def compare_paired(scores: Sequence[float], baseline: Sequence[float], seed: int = 0) -> Comparison:
    """Every paired statistic of two lists of scores of the same samples in the same order.

    Raises:
        ValueError: the lists differ in length, or are empty.
    """
    interval = paired_difference(scores, baseline, seed)
    won = sum(a > b for a, b in zip(scores, baseline, strict=True))
    lost = sum(a < b for a, b in zip(scores, baseline, strict=True))
    n = interval.n
    differences = np.asarray(scores, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    # a sample that differs by d counts as d discordant ones, for the size of a study only
    size = float(np.abs(differences).mean())
    return Comparison(
        difference=interval.value,
        low=interval.low,
        high=interval.high,
        n=n,
        won=won,
        lost=lost,
        p=sign_test(differences, seed),
        needed=samples_needed(min(abs(interval.value), size), size),
        detectable=smallest_difference(size, n),
    )


def mcnemar(won: int, lost: int) -> float:
    """Two-sided exact p-value of `won` against `lost` discordant samples: twice the smaller binomial tail, at most 1.

    No approximation, only rounding: off from integer arithmetic by 4e-13 of the value at most, and 0 below 1e-300.

    Raises:
        ValueError: a negative count.
    """
    if min(won, lost) < 0:
        raise ValueError(f"Discordant samples are counted from 0, got {won} won and {lost} lost.")
    fewer, more = sorted((won, lost))
    # P(X <= k) of a fair coin thrown n times is I(n - k, k + 1) at one half; I is not defined where n = k = 0
    return min(1.0, 2 * float(betainc(more, fewer + 1, 0.5))) if more else 1.0


def sign_test(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of paired differences: exact McNemar where all are -1, 0 or 1, else by signs.

    Differences of one size are one binomial, so all patterns of signs are counted where there are at most `EXACT`
    combinations of the sizes but the most frequent one, whose part is a tail. Beyond that, signs are thrown.
    """
    rounded = np.round(differences, 9)
    sizes, counts = np.unique(np.abs(rounded[rounded != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    if len(sizes) == 1:
        return mcnemar(int((rounded > 0).sum()), int((rounded < 0).sum()))
    order = np.argsort(counts, kind="stable")
    sizes, counts = sizes[order], counts[order]
    seen = abs(float(rounded.sum())) - 1e-7
    if seen <= 0:
        return 1.0
    if math.prod(int(count) + 1 for count in counts[:-1]) <= EXACT:
        return _counted(sizes, counts, seen)
    draw = np.random.default_rng(seed)
    sums = np.zeros(FLIPS)
    for size, count in zip(sizes, counts, strict=True):
        sums += size * (2.0 * draw.binomial(count, 0.5, size=FLIPS) - count)
    return (1 + int((np.abs(sums) >= seen).sum())) / (1 + FLIPS)


def _counted(sizes: np.ndarray, counts: np.ndarray, seen: float) -> float:
    """The share of sign patterns whose sum is at least `seen` away from 0; `counts` differences of each of `sizes`."""
    sums, logs = np.zeros(1), np.zeros(1)
    for size, n in zip(sizes[:-1], counts[:-1], strict=True):
        plus = np.arange(n + 1)
        ways = gammaln(n + 1) - gammaln(plus + 1) - gammaln(n - plus + 1) - n * math.log(2)
        sums = (sums[:, None] + size * (2.0 * plus - n)).ravel()
        logs = (logs[:, None] + ways).ravel()
    size, n = float(sizes[-1]), int(counts[-1])
    # so many of the most frequent size may be negative for the sum to reach `seen`
    negative = np.floor((n - (seen - sums) / size) / 2)
    tail = np.where(negative >= 0, bdtr(np.clip(negative, 0, n), n, 0.5), 0.0)
    return min(1.0, 2 * float(np.exp(logs) @ tail))  # the law is symmetric


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: rejecting those of at most a keeps the chance of any false
    rejection among all of them below a, whatever their dependence."""
    adjusted = [0.0] * len(p_values)
    floor = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def samples_needed(difference: float, discordance: float) -> int | None:
    """Samples with which the exact McNemar test at two-sided 5 percent finds a difference with 80 percent power.

    n0 = (z_a sqrt(psi) + z_b sqrt(psi - d^2))^2 / d^2 (Connor 1987), enlarged by n0 / 4 (1 + sqrt(1 + 4 / (n0 d)))^2
    for the discreteness of the exact test.

    Args:
        difference: d, of the two accuracies, in [0, discordance].
        discordance: psi, the share of samples that exactly one of the two gets right.

    Returns:
        The count, or None where the difference is 0.

    Raises:
        ValueError: a difference larger than the discordance, or either outside [0, 1].
    """
    if not 0 <= difference <= discordance <= 1:
        raise ValueError(
            "A difference of accuracies is at most the share of samples on which the two differ, and both lie in "
            f"[0, 1]; got {difference} and {discordance}."
        )
    return None if difference == 0 else math.ceil(_needed(difference, discordance))


def smallest_difference(discordance: float, n: int) -> float | None:
    """Smallest difference of accuracies that `n` samples show with 80 percent power at two-sided 5 percent, given the
    share of discordant samples; None where not even a difference as large as the discordance is shown.

    Halving takes 80 us and ends on the side that is shown. scipy's `brentq` takes 30 us after 0.4 s of importing, and
    ends on either side.
    """
    if discordance <= 0 or _needed(discordance, discordance) > n:
        return None
    low, high = 0.0, discordance
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if middle > 0 and _needed(middle, discordance) <= n else (middle, high)
    return high


def _needed(difference: float, discordance: float) -> float:
    spread = math.sqrt(max(0.0, discordance - difference**2))
    plain = ((Z_TWO_SIDED_5 * math.sqrt(discordance) + Z_POWER_80 * spread) / difference) ** 2
    return plain / 4 * (1 + math.sqrt(1 + 4 / (plain * difference))) ** 2
