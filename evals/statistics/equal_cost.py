"""A method against a control at the same cost, where the control was measured at other costs.

The control's score on a sample at cost c lies between those of its two nearest budgets, linearly in the logarithm of
the cost: s(c) = (1 - w) s(c0) + w s(c1), w = log(c / c0) / log(c1 / c0). Differences keep their pairing, sample by
sample, so what is hard for both cancels. Nothing is extrapolated: outside the measured costs there is no comparison.

The p-value at a measured cost is that of the exact McNemar test. Between two costs a difference is not -1, 0 or 1, and
the sign-flip test takes its place: how often the sum of differences is as far from 0 when each sample's sign is thrown
anew. All patterns are counted where that can be done, see `sign_test`; it is exact where differences are symmetric
around 0, and asymptotically so otherwise, since the sum of their squares does not change with signs. Where there are
too many, flips are drawn by the counts of equal differences, which has the same law as drawing samples; the draw itself
counts as one, so p is never 0.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tokenprune.evals.statistics.bootstrap import Interval, bootstrap_mean
from tokenprune.evals.statistics.significance import samples_needed, sign_test

SAME_COST = 0.01
"""Costs that differ by less than this share are the same."""


@dataclass(frozen=True)
class Difference:
    """A method minus a control at the same cost.

    Attributes:
        value, low, high: mean over samples, with its 95 percent paired bootstrap interval.
        n: samples behind it.
        p: two-sided, see above.
        needed: samples with which a difference as observed would be found with 80 percent power; None where there is
            none.
        between: the control's two costs, the same one twice where it was measured at this cost.
    """

    value: float
    low: float
    high: float
    n: int
    p: float
    needed: int | None
    between: tuple[float, float]


class Curve:
    """A series of one method over its budgets.

    Args:
        points: cost above 0, and scores by sample id, of each budget.
    """

    def __init__(self, points: Sequence[tuple[float, Mapping[str, float]]]) -> None:
        ordered = sorted((point for point in points if point[1]), key=lambda point: point[0])
        self.costs = [cost for cost, _ in ordered]
        self._scores = [scores for _, scores in ordered]

    def around(self, cost: float) -> tuple[int, int, float] | None:
        """Numbers of the budgets below and above a cost, and the weight of the second; None outside of them."""
        near = [i for i, known in enumerate(self.costs) if abs(known - cost) <= SAME_COST * cost]
        if near:
            best = min(near, key=lambda i: abs(self.costs[i] - cost))
            return best, best, 0.0
        above = bisect.bisect(self.costs, cost)
        if not 0 < above < len(self.costs):
            return None
        low, high = self.costs[above - 1], self.costs[above]
        return above - 1, above, math.log(cost / low) / math.log(high / low)

    def scores_at(self, cost: float) -> dict[str, float] | None:
        """Scores by sample id at a cost, of the samples that both neighbours answered; None outside of the costs."""
        found = self.around(cost)
        if found is None:
            return None
        below, above, weight = found
        first, second = self._scores[below], self._scores[above]
        return {name: (1 - weight) * first[name] + weight * second[name] for name in first if name in second}

    def against(self, mine: Mapping[str, float], cost: float, seed: int = 0) -> Difference | None:
        """`mine` minus this curve at a cost; None outside of its costs, or without a common sample."""
        found, theirs = self.around(cost), self.scores_at(cost)
        if found is None or theirs is None:
            return None
        differences = np.array([mine[name] - theirs[name] for name in mine if name in theirs])
        if not len(differences):
            return None
        return difference(differences, (self.costs[found[0]], self.costs[found[1]]), seed)

    def area(self, low: float, high: float) -> dict[str, float] | None:
        """By sample id, the mean score over the logarithm of the cost from `low` to `high`; None where the curve does
        not reach from one to the other.

        Between budgets the curve is a straight line in log cost, so the mean is that of trapezoids.
        """
        ends = [self.scores_at(low), self.scores_at(high)]
        if not low < high or ends[0] is None or ends[1] is None:
            return None
        inner = [(c, s) for c, s in zip(self.costs, self._scores) if low * (1 + SAME_COST) < c < high / (1 + SAME_COST)]
        path: list[tuple[float, Mapping[str, float]]] = [(low, ends[0]), *inner, (high, ends[1])]
        names = [name for name in path[0][1] if all(name in scores for _, scores in path)]
        total = dict.fromkeys(names, 0.0)
        for (c0, s0), (c1, s1) in zip(path, path[1:]):
            share = math.log(c1 / c0) / math.log(high / low)
            for name in names:
                total[name] += share * (s0[name] + s1[name]) / 2
        return total


def difference(differences: np.ndarray, between: tuple[float, float], seed: int = 0) -> Difference:
    """Statistics of paired differences `[n]`, see `Difference`."""
    interval: Interval = bootstrap_mean(differences.tolist(), seed, between=(-1.0, 1.0))
    size = float(np.abs(differences).mean())
    # a sample that differs by d counts as d discordant ones, for the size of a study only
    needed = samples_needed(min(abs(interval.value), size), size) if size else None
    p = sign_test(differences, seed)
    return Difference(interval.value, interval.low, interval.high, interval.n, p, needed, between)
