"""How large an accuracy drop can still be: a one-sided 95 percent upper bound from the same questions answered twice.

Two bounds are computed and the larger one counts.

- The paired bootstrap: pictures are drawn with replacement, each with all of its questions, and the bound is the 95th
  percentile of the drop. With few discordant pairs (one model right, the other wrong) it is too low: where no pair is
  discordant it is 0, however few the samples.
- The exact unconditional bound, by inverting the score test for a paired difference of proportions (Tango, Statistics
  in Medicine 17, 1998): the smallest drop at which a statistic this low has at most the chance of 5 percent, under
  every rate of discordant pairs inside a 99.9 percent interval for it (Berger and Boos, JASA 89, 1994; its 0.1 percent
  is added to the p-value). The rates are a grid, the probabilities are sums over the trinomial. It takes samples as
  independent. Where several questions share a picture, counts are divided by the design effect of the
  pictures (at least 1; Rao and Scott's effective sample size), which makes the bound an approximation.

With more than `EXACT_PAIRS` discordant pairs the bootstrap counts alone. Scores between 0 and 1 enter the
exact bound rounded up in the pruned model's disfavour, so that they cannot make it too low.

scipy has exact tests of unpaired proportions only, so the bound is written here; the binomial limit and the normal
quantiles are from `scipy.special`. The trinomial's log factorials are a table and its powers a product each: for
5000 samples with 140 discordant pairs `gammaln` takes 19 times as long for the first (12 ms for 0.6 ms), and `xlogy` 11
times for the second (1 ms for 0.09 ms, over a thousand times a bound).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.special import betaincinv, ndtri

LEVEL = 0.95
"""One-sided."""
EXACT_PAIRS = 150
"""Most discordant pairs for which the exact bound is computed."""
RESAMPLES = 10_000
_NUISANCE = 0.001
_GRID = 25
_NORMAL_95, _NORMAL_80 = map(float, ndtri([LEVEL, 0.8]))


@dataclass(frozen=True)
class Pairs:
    """What the same questions, answered with and without pruning, show of the drop in accuracy (1 = all of it).

    Attributes:
        value: mean of unpruned minus pruned.
        n: samples.
        lost, won: samples on which pruning lost and won something.
        pictures: pictures that the samples are about.
        design_effect: how many times larger the variance is than that of as many unrelated samples, at least 1.
    """

    value: float
    n: int
    lost: int
    won: int
    pictures: int
    design_effect: float


@dataclass(frozen=True)
class Drop(Pairs):
    """The same with its bounds.

    Attributes:
        bootstrap, exact: one-sided 95 percent upper bounds; `exact` is None where it was not computed.
    """

    bootstrap: float
    exact: float | None

    @property
    def bound(self) -> float:
        """The bound that counts: the larger one."""
        return self.bootstrap if self.exact is None else max(self.bootstrap, self.exact)


class Answers:
    """The same samples, answered twice.

    Args:
        unpruned, pruned: scores from 0 to 1 of the same samples in the same order.
        pictures: which picture each sample is about; None means each its own.

    Raises:
        ValueError: lengths differ, there are no samples, or a score is outside 0..1.
    """

    def __init__(
        self, unpruned: Sequence[float], pruned: Sequence[float], pictures: Sequence[object] | None = None
    ) -> None:
        n = len(unpruned)
        if not n or len(pruned) != n or (pictures is not None and len(pictures) != n):
            raise ValueError(
                f"A drop needs the same samples twice and the picture of each, got {n} unpruned and {len(pruned)} "
                f"pruned scores{'' if pictures is None else f' and {len(pictures)} pictures'}."
            )
        scores = np.array([unpruned, pruned], dtype=np.float64)
        if not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError("Scores must be between 0 and 1 for a bound on their drop.")
        self._differences = scores[0] - scores[1]
        of = np.arange(n) if pictures is None else np.unique(np.asarray(pictures, dtype=str), return_inverse=True)[1]
        self._sums, self._sizes = np.bincount(of, weights=self._differences), np.bincount(of)

    def pairs(self) -> Pairs:
        """Counts, without bounds."""
        mine = self._differences
        effect = _design_effect(mine, self._sums, self._sizes)
        return Pairs(
            float(mine.mean()), len(mine), int((mine > 0).sum()), int((mine < 0).sum()), len(self._sizes), effect
        )

    def drop(self, seed: int = 0) -> Drop:
        """Counts and bounds; `seed` is that of the bootstrap."""
        pairs = self.pairs()
        # a part of a gain counts as none, a part of a loss as a whole one
        rounded = np.ceil(self._differences - 1e-12)
        lost, won = int((rounded > 0).sum()), int((rounded < 0).sum())
        exact, effect = None, pairs.design_effect
        if lost + won <= EXACT_PAIRS:
            # rounded so that the bound can only grow
            exact = exact_bound(math.floor(pairs.n / effect), math.ceil(lost / effect), math.floor(won / effect))
        return Drop(**vars(pairs), bootstrap=_bootstrap_bound(self._sums, self._sizes, seed), exact=exact)


def _bootstrap_bound(sums: np.ndarray, sizes: np.ndarray, seed: int) -> float:
    """The 95th percentile over resampled pictures. Counts per kind of picture are drawn, not pictures: same law."""
    kinds, counts = np.unique(np.stack([sums, sizes], 1), axis=0, return_counts=True)
    total = len(sums)
    draws = np.random.default_rng(seed).multinomial(total, counts / total, size=RESAMPLES)
    return float(np.quantile((draws @ kinds[:, 0]) / (draws @ kinds[:, 1]), LEVEL))


def _design_effect(differences: np.ndarray, sums: np.ndarray, sizes: np.ndarray) -> float:
    n, pictures = len(differences), len(sizes)
    mean = differences.mean()
    spread = float(((differences - mean) ** 2).sum()) / max(n - 1, 1)
    if pictures == n or pictures < 2 or spread == 0:  # one picture, or nothing to estimate it from
        return 1.0
    between = float(((sums - sizes * mean) ** 2).sum()) * pictures / (pictures - 1) / n
    return max(1.0, between / spread)


@cache
def exact_bound(n: int, lost: int, won: int) -> float:
    """The exact unconditional upper bound of the drop, at least 0, from `lost` and `won` pairs of `n`."""
    tail = _Tail(n, lost, won)
    if not tail.likely(0.0):
        return 0.0
    low, high = max(0.0, (lost - won) / n), tail.most
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if tail.likely(middle) else (low, middle)
    return high


class _Tail:
    """Whether a statistic at most as high as the one seen is likely enough, were the drop `delta`."""

    def __init__(self, n: int, lost: int, won: int) -> None:
        self.n, self.lost, self.won = n, lost, won
        self.most = binomial_upper(n, lost + won, _NUISANCE)
        # beyond this many pairs of a kind the trinomial has no mass that counts, at any rate up to `most`
        reach = math.ceil(n * self.most + 6 * math.sqrt(n * self.most) + 6)
        side = np.arange(min(n, reach) + 1)
        losses, wins = (axis.ravel() for axis in np.meshgrid(side, side, indexing="ij"))
        possible = losses + wins <= n
        self.losses, self.wins = losses[possible], wins[possible]
        log = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
        self.ways = log[n] - log[self.losses] - log[self.wins] - log[n - self.losses - self.wins]

    def likely(self, delta: float) -> bool:
        if delta >= self.most:
            return False
        seen = _score(self.n, np.array([self.lost]), np.array([self.won]), delta)[0]
        low = _score(self.n, self.losses, self.wins, delta) <= seen + 1e-9
        lost, won, ways = self.losses[low], self.wins[low], self.ways[low]
        same = self.n - lost - won
        for rate in np.linspace(delta, self.most, _GRID):
            losing, winning = (rate + delta) / 2, (rate - delta) / 2
            logs = ways + _times_log(lost, losing) + _times_log(won, winning) + _times_log(same, 1 - rate)
            if float(np.exp(logs).sum()) + _NUISANCE > 1 - LEVEL:
                return True
        return False


def _times_log(count: np.ndarray, chance: float) -> np.ndarray:
    if chance <= 0:
        return np.where(count == 0, 0.0, -np.inf)
    return count * math.log(chance)


def _score(n: int, lost: np.ndarray, won: np.ndarray, delta: float) -> np.ndarray:
    """Tango's statistic: the drop seen minus `delta`, in standard errors under the likeliest rates of that drop."""
    b = lost * (1 + delta) + won * (1 - delta) - 2 * n * delta
    winning = (b + np.sqrt(b * b + 8 * n * won * delta * (1 - delta))) / (4 * n)
    variance = n * np.maximum(2 * winning + delta - delta * delta, 0)
    gap = (lost - won - n * delta).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.abs(gap) < 1e-12, 0.0, gap / np.sqrt(variance))


def binomial_upper(n: int, count: int, alpha: float) -> float:
    """Clopper and Pearson's one-sided upper limit of a share: that at which at most `count` of `n` has chance alpha."""
    # X <= k has the chance I(n - k, k + 1) at 1 - share, and the other end of I is its complement
    return 1.0 if count >= n else float(betaincinv(count + 1, n - count, 1 - alpha))


def samples_needed(drop: Pairs, within: float) -> int | None:
    """Samples on which a drop like this one would be shown to be within `within` four times out of five; None where the
    drop itself is not below it. A normal approximation that takes the rate of discordant pairs for the true one."""
    if drop.value >= within:
        return None
    # one more discordant pair than seen, or a run without any would promise the impossible
    rate = (drop.lost + drop.won + 1) / (drop.n + 1)
    spread = drop.design_effect * max(rate - drop.value**2, 0)
    needed = ((_NORMAL_95 + _NORMAL_80) ** 2) * spread / (within - drop.value) ** 2
    return max(math.ceil(needed), smallest_sample(within))


@cache
def smallest_sample(within: float) -> int:
    """Samples below which no answers, not even the very same ones, show a drop within `within`."""
    low, high = 1, 1
    while exact_bound(high, 0, 0) > within:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if exact_bound(middle, 0, 0) > within else (low, middle)
    return high
