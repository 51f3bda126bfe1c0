"""What comes from scipy against the formulas in plain Python that stood in its place, on committed runs and at random.

A report's numbers may not depend on whose code computes them: 1e-12 of the value, and counts of samples exactly.
"""

from __future__ import annotations

import csv
import json
import math
from typing import Any

import numpy as np
import pytest
from _paths import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.evals.statistics import drop_bounds, significance

DOCS = ROOT / "docs"
ALIKE = {"rel": 1e-12, "abs": 0.0}
NINE_DIGITS = {"rel": 6e-9, "abs": 0.0}
"""What a CSV file keeps of a number."""


def plain_mcnemar(won: int, lost: int) -> float:
    total = won + lost
    term = tail = 1
    for k in range(1, min(won, lost) + 1):
        term = term * (total - k + 1) // k
        tail += term
    return min(1.0, 2 * tail / (1 << total))


def plain_binomial_upper(n: int, count: int, alpha: float) -> float:
    low, high = count / n, 1.0
    if count >= n:
        return 1.0
    ways = [math.log(math.comb(n, k)) for k in range(count + 1)]
    for _ in range(60):
        middle = (low + high) / 2
        chance = math.fsum(
            math.exp(w + k * math.log(middle) + (n - k) * math.log1p(-middle)) for k, w in enumerate(ways)
        )
        low, high = (middle, high) if chance > alpha else (low, middle)
    return high


def plain_needed(difference: float, discordance: float) -> float:
    spread = math.sqrt(max(0.0, discordance - difference**2))
    plain = ((1.959963984540054 * math.sqrt(discordance) + 0.8416212335729143 * spread) / difference) ** 2
    return plain / 4 * (1 + math.sqrt(1 + 4 / (plain * difference))) ** 2


def compared_rows() -> list[tuple[dict[str, str], str]]:
    """Rows of the committed leaderboards, each with the baseline that it was tested against."""
    rows = [row for file in sorted(DOCS.glob("leaderboards/*.csv")) for row in csv.DictReader(file.open())]
    return [(row, name) for row in rows for name in ("vs_unpruned", "vs_random") if row[f"{name}_p"]]


def committed_drops(data: Any) -> list[dict[str, Any]]:
    """Everything in the committed recommendations that is a drop with its bounds."""
    if isinstance(data, dict):
        return [data] * ("design_effect" in data) + [one for value in data.values() for one in committed_drops(value)]
    return [one for value in data for one in committed_drops(value)] if isinstance(data, list) else []


DROPS = [
    drop
    for file in sorted(DOCS.glob("bench/recommend-*.json"))
    for drop in committed_drops(json.loads(file.read_text(encoding="utf-8")))
]


def test_tests_of_the_committed_leaderboards_stay():
    rows = compared_rows()
    assert len(rows) > 100
    for row, name in rows:
        n, won, lost = (int(row[key]) for key in ("n", f"{name}_won", f"{name}_lost"))
        p = significance.mcnemar(won, lost)
        assert p == pytest.approx(plain_mcnemar(won, lost), **ALIKE)
        assert p == pytest.approx(float(row[f"{name}_p"]), **NINE_DIGITS)
        needed = significance.samples_needed(abs(won - lost) / n, (won + lost) / n)
        assert needed == (int(row[f"{name}_needed"]) if row[f"{name}_needed"] else None)
        shown = significance.smallest_difference((won + lost) / n, n)
        written = row[f"{name}_detectable"]
        assert shown == (pytest.approx(float(written), **NINE_DIGITS) if written else None)


def bound_of_the_plain_limit(n: int, lost: int, won: int) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drop_bounds, "binomial_upper", plain_binomial_upper)
        return drop_bounds.exact_bound.__wrapped__(n, lost, won)


def test_bounds_of_the_committed_recommendations_stay():
    bounded = [drop for drop in DROPS if drop.get("exact") is not None]
    assert len(bounded) > 10
    for drop in bounded:
        n, effect = drop["n"], drop["design_effect"]
        # scores of that suite are 0 or 1, so that none was rounded
        counts = math.floor(n / effect), math.ceil(drop["lost"] / effect), math.floor(drop["won"] / effect)
        bound = drop_bounds.exact_bound(*counts)
        assert bound == pytest.approx(bound_of_the_plain_limit(*counts), **ALIKE)
        # those files are of a halving that began elsewhere; either ends within 1e-5
        assert bound == pytest.approx(drop["exact"], abs=1e-5, rel=0)


def test_quantiles_of_the_normal_law_are_the_tabled_ones():
    assert (significance.Z_TWO_SIDED_5, significance.Z_POWER_80) == (1.959963984540054, 0.8416212335729143)
    assert drop_bounds._NORMAL_95 == 1.6448536269514722


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_mcnemar_is_that_of_integers(won, lost):
    exact = plain_mcnemar(won, lost)
    # below 1e-300 it is 0, which no report tells from it
    assert significance.mcnemar(won, lost) == pytest.approx(exact, rel=1e-12, abs=1e-250)


@given(st.integers(1, 5000), st.integers(0, 150), st.sampled_from((0.001, 0.025, 0.05)))
def test_the_limit_of_a_share_is_that_of_sums(n, count, alpha):
    # the sum has log binomials of up to 1e4, so its own last digits are gone
    assert drop_bounds.binomial_upper(n, count, alpha) == pytest.approx(
        plain_binomial_upper(n, count, alpha), rel=2e-12
    )


@given(st.floats(0.001, 1.0), st.floats(0.001, 1.0))
def test_sample_sizes_are_the_same_numbers(share, discordance):
    difference = share * discordance
    assert significance.samples_needed(difference, discordance) == math.ceil(plain_needed(difference, discordance))


@settings(max_examples=15)
@given(st.integers(20, 400), st.integers(0, 15), st.integers(0, 15))
def test_the_exact_bound_is_that_of_the_plain_limit(n, lost, won):
    bound = drop_bounds.exact_bound.__wrapped__(n, lost, won)
    assert bound == pytest.approx(bound_of_the_plain_limit(n, lost, won), rel=1e-11, abs=0)


def test_counts_resample_as_samples_do():
    """scipy's bootstrap of the same scores: another generator's draws, the same interval but for their noise."""
    from scipy.stats import bootstrap

    from tokenprune.evals.statistics.bootstrap import bootstrap_mean

    scores = (np.random.default_rng(0).random(400) < 0.7).astype(float)
    library = bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", random_state=1, batch=1000)
    ours = bootstrap_mean(scores.tolist(), seed=2, resamples=20_000)
    # one step of a mean of 400 scores is 0.0025
    assert (ours.low, ours.high) == pytest.approx(tuple(library.confidence_interval), abs=0.0026)
