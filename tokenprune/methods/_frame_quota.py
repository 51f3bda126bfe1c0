"""A budget of tokens dealt out to frames by weight, in whole numbers and whole grids. Plain Python, exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from tokenprune.interfaces.selection import fit_grid

Grid = tuple[int, int]
Rung = tuple[int, int, Grid]
"""What a frame may become: what it costs of the budget, its cells, and (rows, cols)."""


@lru_cache(maxsize=256)
def ladder(grid: Grid, row_ends: bool, flat: bool) -> tuple[Rung, ...]:
    """All that a frame may become, from the smallest to the whole; cost and cells grow strictly.

    A square frame has (s, s) and (s + 1, s), the card's grids; others have the rasters that keep their shape
    (`fit_grid`), because near squares would not fit into them.

    Args:
        grid: (rows, cols) of the frame.
        row_ends: whether a row costs one token more.
        flat: any number of cells will do, as one row.
    """
    rows, cols = grid
    if flat:
        return tuple((n, n, (1, n)) for n in range(1, rows * cols + 1))
    grids: list[Grid] = []
    if rows == cols:
        grids = [(s + more, s) for s in range(1, rows + 1) for more in (0, 1) if s + more <= rows]
    else:
        left = rows * cols
        while left:
            grids.append(fit_grid(grid, left))
            left = grids[-1][0] * grids[-1][1] - 1
    found: list[Rung] = []
    for high, wide in sorted(grids, key=lambda one: -one[0] * one[1]):
        cost = high * (wide + row_ends)
        if not found or cost < found[-1][0]:  # one that costs as much and has fewer cells is of no use
            found.append((cost, high * wide, (high, wide)))
    return tuple(reversed(found))


def fill(weights: Sequence[int], budget: int, low: Sequence[int], high: Sequence[int]) -> list[Fraction]:
    """Shares in proportion to the weights, none below `low` or above `high`, that add up to the budget.

    What a bound takes or gives is dealt to the others in proportion, until nothing changes. Where all of positive
    weight are full, the others share what is left alike; sum(low) is at most the budget.
    """
    shares = [Fraction(bound) for bound in low]
    positive = [i for i, weight in enumerate(weights) if weight > 0]
    budget = min(budget, sum(high))
    rest = budget - sum(low)
    room = sum(high[i] - low[i] for i in positive)
    if rest > room:
        for i in positive:
            shares[i] = Fraction(high[i])
        others = [i for i, weight in enumerate(weights) if weight <= 0]
        alike = fill([1] * len(others), rest - room + sum(low[i] for i in others), [low[i] for i in others],
                     [high[i] for i in others])  # fmt: skip
        for i, share in zip(others, alike):
            shares[i] = share
        return shares
    target = rest + sum(low[i] for i in positive)
    levels = sorted({Fraction(bound[i], weights[i]) for i in positive for bound in (low, high)})

    def total(level: Fraction) -> Fraction:
        return sum((Fraction(min(max(level * weights[i], low[i]), high[i])) for i in positive), Fraction(0))

    first, last = 0, len(levels) - 1
    if not positive:
        return shares
    while first < last:  # the lowest level that is enough
        middle = (first + last) // 2
        first, last = (first, middle) if total(levels[middle]) >= target else (middle + 1, last)
    level = levels[first]  # at the lowest all are at their lower bounds, which the budget has room for
    if first and total(level) > target:  # between two levels the total grows as a straight line
        below = levels[first - 1]
        at_below = total(below)
        level = below + (level - below) * (target - at_below) / (total(level) - at_below)
    for i in positive:
        shares[i] = min(max(level * weights[i], Fraction(low[i])), Fraction(high[i]))
    return shares


def squares(scores: Sequence[float]) -> list[int]:
    """Squared scores as whole numbers to a common scale, exact; all 1 where their sum is below 1e-12."""
    exact = [Fraction(score) ** 2 for score in scores]
    if sum(exact) < Fraction(1, 10**12):
        return [1] * len(scores)
    scale = math.lcm(*(one.denominator for one in exact))
    return [int(one * scale) for one in exact]


def deal_grids(
    weights: Sequence[int], budget: int, ladders: Sequence[tuple[Rung, ...]], floor: bool, cap: bool, nearest: bool
) -> list[Rung | None]:
    """What each frame becomes; None where it is dropped. All together cost at most the budget, unless it is less than
    one token costs: one stays then.

    Args:
        weights: of the frames, at least 0.
        budget: k.
        ladders: of the frames.
        floor: whether each frame has one token, those of the largest weights first.
        cap: whether what a frame cannot use is dealt to the others.
        nearest: whether what rounding down leaves is spent.
    """
    most, least = [rungs[-1][0] for rungs in ladders], [rungs[0][0] for rungs in ladders]
    low, left = [0] * len(weights), budget
    by_weight = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    for i in by_weight if floor else []:
        if least[i] <= left:
            low[i], left = least[i], left - least[i]
    shares = fill(weights, budget, low, most if cap else [max(budget, top) for top in most])
    shares = [min(share, Fraction(top)) for share, top in zip(shares, most)]
    chosen = [sum(rung[0] <= share for rung in rungs) for share, rungs in zip(shares, ladders)]  # rungs climbed
    costs = [rungs[step - 1][0] if step else 0 for step, rungs in zip(chosen, ladders)]
    left = budget - sum(costs)

    def steps() -> list[tuple[Fraction, int, int]]:
        """(how far it is above its share, the frame, what its next grid costs), of all that can be afforded."""
        found = []
        for i, rungs in enumerate(ladders):
            short = shares[i] - costs[i]
            if chosen[i] < len(rungs) and shares[i] > 0 and (cap or short > 0):
                more = rungs[chosen[i]][0] - costs[i]
                if more <= left:
                    found.append((-short, i, more))
        return found

    while nearest and left and (open_to := steps()):
        _, i, more = min(open_to)
        chosen[i], costs[i], left = chosen[i] + 1, costs[i] + more, left - more
    if not any(chosen):
        chosen[by_weight[0]] = 1
    return [rungs[step - 1] if step else None for step, rungs in zip(chosen, ladders)]
