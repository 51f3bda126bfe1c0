"""McNemar against fractions, Holm against its definition, power against the exact test's own power and a simulation."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, comb, exp, lgamma, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.evals.statistics.significance import (
    compare_paired,
    holm,
    mcnemar,
    samples_needed,
    smallest_difference,
)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial(won, lost):
    total = won + lost
    # every outcome of the fair coin that is no likelier than the one seen; the coin's law is symmetric
    seen = comb(total, won)
    p = sum(Fraction(comb(total, k), 2**total) for k in range(total + 1) if comb(total, k) <= seen)
    assert mcnemar(won, lost) == pytest.approx(float(p), rel=1e-14)
    assert mcnemar(won, lost) == mcnemar(lost, won)


def test_mcnemar_of_many_samples_is_finite():
    assert 0 < mcnemar(30_000, 29_000) < 1e-4
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1.0
    assert mcnemar(0, 6) == 2 / 64
    with pytest.raises(ValueError, match="counted from 0, got -1"):
        mcnemar(-1, 3)


def holm_by_definition(ps: list[float], alpha: Fraction) -> set[int]:
    """Step down: the smallest against alpha / m, the next against alpha / (m - 1), and stop at the first that stays."""
    rejected: set[int] = set()
    for step, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        if Fraction(ps[index]) > alpha / (len(ps) - step):
            break
        rejected.add(index)
    return rejected


# eighths and sixty-fourths: products with small integers are exact, so that levels can be met exactly
@given(st.lists(st.integers(0, 64).map(lambda k: k / 64), max_size=8), st.integers(1, 64))
def test_holm_rejects_what_its_definition_rejects(ps, level):
    adjusted = holm(ps)
    assert {i for i, p in enumerate(adjusted) if p <= level / 64 and p < 1} == {
        i for i in holm_by_definition(ps, Fraction(level, 64)) if adjusted[i] < 1
    }


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms())
def test_holm_is_monotone_and_knows_no_order(ps, random):
    adjusted = holm(ps)
    assert all(p <= a <= 1 for p, a in zip(ps, adjusted))
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)
    shuffled = list(range(len(ps)))
    random.shuffle(shuffled)
    assert holm([ps[i] for i in shuffled]) == [adjusted[i] for i in shuffled]
    assert holm(ps + [1.0])[: len(ps)] >= adjusted  # one more test never makes the others surer
    assert holm(ps[:1]) == ps[:1]


def log_binomial(n: int, k: np.ndarray | int, p: float) -> float:
    if p in (0.0, 1.0):
        return 0.0 if k == n * p else -np.inf
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) + k * log(p) + (n - k) * log(1 - p)


def exact_power(n: int, difference: float, discordance: float) -> float:
    """Chance that the exact test rejects at 5 percent: over every count of discordant samples and every split of it."""
    share, spread = (1 + difference / discordance) / 2, (n * discordance * (1 - discordance)) ** 0.5
    counts = range(max(0, int(n * discordance - 6 * spread)), min(n, int(n * discordance + 6 * spread) + 1) + 1)
    power = 0.0
    for total in counts:
        tail = [k for k in range(total // 2 + 1) if mcnemar(k, total - k) <= 0.05]
        rejected = {*tail, *(total - k for k in tail)}
        power += exp(log_binomial(n, total, discordance)) * sum(exp(log_binomial(total, k, share)) for k in rejected)
    return power


@pytest.mark.parametrize(
    ("difference", "discordance"), [(0.05, 0.1), (0.06, 0.2), (0.1, 0.2), (0.12, 0.4), (0.3, 0.4), (0.03, 0.06)]
)
def test_needed_samples_give_the_power(difference, discordance):
    n = samples_needed(difference, discordance)
    assert n is not None
    assert 0.8 <= exact_power(n, difference, discordance) <= 0.88
    assert exact_power(ceil(0.8 * n), difference, discordance) < 0.8


def test_needed_samples_by_simulation():
    difference, discordance = 0.1, 0.25
    n = samples_needed(difference, discordance)
    assert n is not None
    law = [(discordance + difference) / 2, (discordance - difference) / 2, 1 - discordance]
    rng = np.random.default_rng(0)
    found = [mcnemar(int(won), int(lost)) <= 0.05 for won, lost, _ in rng.multinomial(n, law, size=4000)]
    assert 0.80 - 0.02 <= np.mean(found) <= 0.86  # three standard errors of 4000 draws are 0.019


@settings(max_examples=60)
@given(st.floats(0.01, 1.0), st.integers(5, 50_000))
def test_smallest_difference_is_the_inverse(discordance, n):
    found = smallest_difference(discordance, n)
    most = samples_needed(discordance, discordance)
    assert most is not None
    if found is None:
        assert most > n
        return
    needed = samples_needed(min(found * (1 + 1e-9), discordance), discordance)
    less = samples_needed(found * 0.98, discordance)
    assert needed is not None and less is not None
    assert needed <= n < less + 1


def test_no_difference_needs_no_number_of_samples():
    assert samples_needed(0.0, 0.3) is None
    assert smallest_difference(0.0, 100) is None
    with pytest.raises(ValueError, match="got 0.4 and 0.3"):
        samples_needed(0.4, 0.3)


def test_comparison_of_two_lists():
    found = compare_paired([1, 1, 1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 0, 0, 0])
    assert (found.won, found.lost, found.n, found.difference) == (4, 1, 8, 3 / 8)
    assert found.p == mcnemar(4, 1) and found.low <= 3 / 8 <= found.high
    assert found.needed == samples_needed(3 / 8, 5 / 8)
    half = compare_paired([0.3, 0.9], [0.6, 0.6])  # scores between 0 and 1: the sign test
    assert (half.won, half.lost, half.p) == (1, 1, 1.0)


def test_many_small_wins_are_not_tested_as_few_large_losses():
    """200 graded answers: a third better on 60, wholly worse on 21; the mean is a little lower, not told apart."""
    mine = [1.0] * 60 + [0.0] * 21 + [1.0] * 119
    other = [2 / 3] * 60 + [1.0] * 21 + [1.0] * 119
    found = compare_paired(mine, other)
    assert (found.won, found.lost) == (60, 21) and mcnemar(60, 21) < 1e-4
    assert found.difference == pytest.approx(-0.005) and found.low < 0 < found.high
    assert found.p > 0.5 and found.needed is not None and found.needed > 10_000
    # where all differences are as large as each other it is McNemar's test
    assert compare_paired([1 / 3] * 6, [0.0] * 6).p == mcnemar(6, 0)
