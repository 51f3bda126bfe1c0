"""Bounds of a drop: against enumeration, textbook limits, and their coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.evals.statistics.drop_bounds import (
    Answers,
    Drop,
    binomial_upper,
    exact_bound,
    samples_needed,
    smallest_sample,
)


def measure_drop(*answers) -> Drop:
    return Answers(*answers).drop()


def trinomial(n: int, losing: float, winning: float) -> list[tuple[int, int, float]]:
    rest = 1 - losing - winning
    return [
        (lost, w, math.comb(n, lost) * math.comb(n - lost, w) * losing**lost * winning**w * rest ** (n - lost - w))
        for lost in range(n + 1)
        for w in range(n + 1 - lost)
    ]


@pytest.mark.parametrize(("losing", "winning"), [(0.05, 0.0), (0.08, 0.03), (0.15, 0.15), (0.3, 0.1), (0.02, 0.01)])
def test_the_exact_bound_misses_the_true_drop_at_most_once_in_twenty(losing, winning):
    """Over every outcome of 20 pairs, weighted by its chance: no simulation, no luck."""
    n, drop = 20, losing - winning
    missed = sum(
        chance for lost, w, chance in trinomial(n, losing, winning) if chance > 1e-7 and exact_bound(n, lost, w) < drop
    )
    assert missed <= 0.05 + 1e-5


def test_the_bootstrap_alone_would_miss_it_far_more_often():
    n, losing = 25, 0.05
    missed = sum(
        chance
        for lost, w, chance in trinomial(n, losing, 0.0)
        if chance > 1e-7 and measure_drop([1.0] * n, [0.0] * lost + [1.0] * (n - lost)).bootstrap < losing
    )
    assert missed > 0.25


def test_no_lost_answer_is_no_proof():
    # the smallest drop under which all answers stay with a chance of 5 percent, one-sided: 1 - 0.05 ** (1 / n)
    for n in (20, 100, 500):
        assert 1 - 0.05 ** (1 / n) <= exact_bound(n, 0, 0) <= 1 - 0.049 ** (1 / n) + 2e-5
    same = measure_drop([1.0] * 100, [1.0] * 100)
    assert same.bootstrap == 0 and same.bound == same.exact > 0.029


def test_many_pairs_agree_with_the_normal_limit():
    bound, wald = exact_bound(1000, 60, 40), 0.02 + 1.645 * math.sqrt(100 - 0.4) / 1000
    assert bound == pytest.approx(wald, rel=0.03)


@settings(max_examples=25)
@given(st.integers(5, 60), st.data())
def test_the_bound_moves_with_the_answers(n, data):
    lost = data.draw(st.integers(0, n // 3))
    won = data.draw(st.integers(0, n // 3))
    bound = exact_bound(n, lost, won)
    assert bound >= (lost - won) / n
    assert exact_bound(n, lost + 1, won) >= bound - 1e-4
    assert exact_bound(n, lost, won + 1) <= bound + 1e-4


def test_the_limit_of_a_share_is_the_textbook_one():
    assert binomial_upper(20, 0, 0.05) == pytest.approx(1 - 0.05 ** (1 / 20))
    assert binomial_upper(10, 3, 0.025) == pytest.approx(0.6525, abs=1e-4)  # Clopper and Pearson, 3 of 10
    assert binomial_upper(10, 10, 0.05) == 1


def test_questions_that_share_a_picture_count_for_less():
    rng = np.random.default_rng(0)
    pictures = np.repeat(np.arange(80), 5)
    bad = rng.random(80) < 0.05  # a picture loses all of its answers or none
    pruned = np.where(bad[pictures], 0.0, 1.0)
    alone = measure_drop([1.0] * 400, pruned.tolist())
    shared = measure_drop([1.0] * 400, pruned.tolist(), [str(p) for p in pictures])
    assert shared.design_effect == pytest.approx(5, rel=0.05) and shared.pictures == 80
    assert shared.value == alone.value and shared.bootstrap > alone.bootstrap and shared.exact > alone.exact
    assert shared.exact == pytest.approx(exact_bound(80, int(bad.sum()), 0), abs=0.01)


def test_shared_pictures_are_covered():
    """200 draws of 100 pictures with 4 questions each, whose answers are lost together half of the time."""
    rng, missed, drop, runs = np.random.default_rng(1), 0, 0.08, 200
    for _ in range(runs):
        together = rng.random((100, 1)) < drop
        single = rng.random((100, 4)) < drop
        lost = np.where(rng.random((100, 1)) < 0.5, together, single)
        pruned = (1.0 - lost).ravel().tolist()
        pictures = np.repeat(np.arange(100), 4).tolist()
        missed += measure_drop([1.0] * 400, pruned, pictures).bound < drop
    assert missed <= 21  # 0.999 quantile of Binomial(200, 0.05)


def test_graded_scores_can_only_raise_the_exact_bound():
    unpruned, pruned = [1.0] * 50, [0.7] * 3 + [1.0] * 47
    graded = measure_drop(unpruned, pruned)
    assert graded.value == pytest.approx(0.018) and graded.exact == exact_bound(50, 3, 0)
    gained = measure_drop(pruned, unpruned)
    assert gained.exact == exact_bound(50, 0, 0), "part of a gain counts as none"


def test_how_many_samples_a_bound_needs():
    assert smallest_sample(0.03) == 100 and exact_bound(100, 0, 0) <= 0.03 < exact_bound(99, 0, 0)
    drop = measure_drop([1.0] * 500 + [0.0] * 500, [1.0] * 490 + [0.0] * 505 + [1.0] * 5)
    assert drop.lost == 10 and drop.won == 5
    needed = samples_needed(drop, 0.01)
    assert needed is not None
    # four times out of five, simulated at that size with those rates
    rng = np.random.default_rng(0)
    shown = 0
    for _ in range(40):
        lost, won, _ = rng.multinomial(needed, [0.010, 0.005, 0.985])
        shown += exact_bound(needed, lost, won) <= 0.01
    assert shown >= 26
    assert samples_needed(drop, 0.005) is None


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (([], []), "got 0 unpruned"),
        (([1.0], [1.0, 0.0]), "got 1 unpruned and 2 pruned"),
        (([1.0], [1.0], ["a", "b"]), "and 2 pictures"),
        (([2.0], [1.0]), "between 0 and 1"),
    ],
)
def test_refuses_what_has_no_bound(args, says):
    with pytest.raises(ValueError, match=says):
        measure_drop(*args)
