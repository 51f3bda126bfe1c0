"""Bootstrap intervals against enumeration of every resample."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest

from tokenprune.evals.statistics.bootstrap import bootstrap_mean, median_iqr, paired_difference


def every_resample(values: list[float]) -> np.ndarray:
    return np.array([np.mean(draw) for draw in product(values, repeat=len(values))])


@pytest.mark.parametrize("values", [[0, 0, 1, 1, 1, 1], [0.0, 0.3, 1.0, 0.5, 0.25], [-1, 0, 0, 1, 1, 0]])
def test_interval_equals_enumeration(values):
    found = bootstrap_mean(values, seed=1, resamples=100_000)
    low, high = np.percentile(every_resample(values), [2.5, 97.5])
    assert found.value == pytest.approx(np.mean(values))
    # means of few samples take few values, so the percentiles may sit one step apart
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    assert found.n == len(values)


def test_paired_difference_keeps_the_pairs():
    a, b = [1, 0, 1, 1, 0], [0, 0, 1, 0, 0]
    found = paired_difference(a, b, resamples=100_000)
    low, high = np.percentile(every_resample([1, 0, 0, 1, 0]), [2.5, 97.5])
    assert found.value == pytest.approx(0.4)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    same = paired_difference(a, a)
    assert same.value == 0.0 and (same.low, same.high) == (pytest.approx(0.025**0.2 - 1), pytest.approx(1 - 0.025**0.2))


@pytest.mark.parametrize("n", [1, 4, 100])
def test_scores_that_are_all_alike_leave_a_doubt(n):
    """Every resample of them is the same, and 4 of 4 right answers are not a certainty."""
    for right in (0, n):
        found = bootstrap_mean([float(right == n)] * n)
        exact = binomtest(right, n).proportion_ci(0.95, method="exact")
        assert (found.low, found.high) == (pytest.approx(exact.low), pytest.approx(exact.high))
    half = bootstrap_mean([0.3 + 1e-16 * place for place in range(n)])
    assert (half.low, half.high) == (pytest.approx(0.3 * 0.025 ** (1 / n)), pytest.approx(1 - 0.7 * 0.025 ** (1 / n)))


def test_same_seed_same_interval():
    scores = np.random.default_rng(0).integers(0, 2, 50).tolist()
    assert bootstrap_mean(scores, seed=3) == bootstrap_mean(scores, seed=3)


def test_bad_input_is_a_sentence():
    with pytest.raises(ValueError, match="at least one sample"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="the same samples twice, got 2 and 1"):
        paired_difference([1, 0], [1])
    assert median_iqr([3.0, 1.0, 2.0]) == {"median": 2.0, "q25": 1.5, "q75": 2.5, "n": 3}
