"""Accuracy over cost: what a method would score at a cost between its measured ones, and the area under its curve.

Every sample has its own curve: its scores at the measured costs, joined by straight lines in log cost. What is computed
here is a weight for each measured cost, so that the weighted sum of a sample's scores is its value at a cost or its
area. Means over samples are then those of the curve of the accuracies, and every pairing of samples is kept. Nothing
is said outside the measured costs. Where the true curve is bent, the straight line is off: too low where accuracy
flattens with cost, which favours what is compared with it; close budgets keep that small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

NEAR = 0.01
"""A cost up to this share below the least measured one is taken for it: the control then spends a little more."""


def weights_at(costs: Sequence[float], cost: float) -> np.ndarray | None:
    """How much each measured cost counts at `cost`, `[len(costs)]`, summing to 1; None outside what was measured.

    Args:
        costs: positive and increasing.
    """
    weights = np.zeros(len(costs))
    if not len(costs) or cost < costs[0] * (1 - NEAR) or cost > costs[-1] * (1 + 1e-9):
        return None
    if cost <= costs[0]:
        weights[0] = 1.0
        return weights
    right = min(int(np.searchsorted(costs, cost, side="left")), len(costs) - 1)
    for place in (right - 1, right):
        if math.isclose(costs[place], cost, rel_tol=1e-9):
            weights[place] = 1.0
            return weights
    share = math.log(cost / costs[right - 1]) / math.log(costs[right] / costs[right - 1])
    weights[right - 1], weights[right] = 1 - share, share
    return weights


def area_weights(costs: Sequence[float], low: float, high: float) -> np.ndarray | None:
    """How much each measured cost counts in the area over log cost from `low` to `high`, divided by the span, so that
    they sum to 1 and the area is a mean accuracy; None where the range is empty or not measured throughout."""
    if high <= low * (1 + 1e-9):
        return None
    ends = weights_at(costs, low), weights_at(costs, high)
    if ends[0] is None or ends[1] is None:
        return None
    inside = [cost for cost in costs if low * (1 + 1e-9) < cost < high * (1 - 1e-9)]
    knots = [low, *inside, high]
    total = np.zeros(len(costs))
    for left, right in zip(knots, knots[1:], strict=False):
        here, there = weights_at(costs, left), weights_at(costs, right)
        if here is None or there is None:
            return None
        total += math.log(right / left) * (here + there) / 2
    return total / math.log(high / low)
