"""Comparisons at equal cost: the interpolation, its interval and test on curves whose truth is known, and areas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tokenprune.evals.results.equal_cost import Curve, area_of, compare_at_cost
from tokenprune.evals.statistics.curve import area_weights, weights_at
from tokenprune.evals.statistics.significance import mcnemar, samples_for, samples_needed, sign_flip
from tokenprune.evals.statistics.verdict import LEAST_SAMPLES, verdict

COSTS = [64.0, 192.0, 576.0]


def rows_of(scores):
    return [{"sample_id": f"s{i}", "correct": float(score), "error": None} for i, score in enumerate(scores)]


def curve_from(columns, costs=COSTS):
    return Curve(list(costs), [{f"s{i}": float(s) for i, s in enumerate(column)} for column in columns])


def test_weights_are_linear_in_log_cost_and_never_leave_what_was_measured():
    assert weights_at(COSTS, 192).tolist() == [0, 1, 0]
    assert weights_at(COSTS, math.sqrt(64 * 192)) == pytest.approx([0.5, 0.5, 0])
    for cost in np.geomspace(64, 576, 40):
        weights = weights_at(COSTS, float(cost))
        assert weights.sum() == pytest.approx(1) and np.exp(weights @ np.log(COSTS)) == pytest.approx(cost)
    assert weights_at(COSTS, 63.7).tolist() == [1, 0, 0], "within 1 percent below the least"
    assert weights_at(COSTS, 63.0) is weights_at(COSTS, 577) is weights_at([], 3) is None


def test_sign_flip_is_mcnemar_on_zeros_and_ones():
    for won, lost in itertools.product((0, 1, 3, 7, 40), (0, 2, 11, 60)):
        assert sign_flip([1.0] * won + [-1.0] * lost + [0.0] * 5) == pytest.approx(mcnemar(won, lost), rel=1e-9)


def test_sign_flip_counts_every_pattern():
    rng = np.random.default_rng(3)
    for _ in range(60):
        values = rng.choice([1, -1, 0.3, -0.3, 0.7, -0.7, 0], size=int(rng.integers(1, 11)))
        sums = [
            abs(sum(s * v for s, v in zip(signs, values))) for signs in itertools.product((1, -1), repeat=len(values))
        ]
        wanted = np.mean([each >= abs(values.sum()) - 1e-9 for each in sums])
        assert sign_flip(values.tolist()) == pytest.approx(wanted, abs=1e-9)


def test_drawn_signs_come_near_the_exact_ones(monkeypatch):
    values = np.random.default_rng(0).choice([1, -1, 0.4, -0.4, 0.6, -0.6], size=60, p=[0.3, 0.2, 0.15, 0.1, 0.15, 0.1])
    exact = sign_flip(values.tolist())
    monkeypatch.setattr("tokenprune.evals.statistics.significance.EXACT_CELLS", 0)
    assert sign_flip(values.tolist()) == pytest.approx(exact, abs=0.006)
    assert sign_flip(values.tolist()) == sign_flip(values.tolist()) and sign_flip([0.5] * 400) > 0


def test_samples_for_is_samples_needed_on_zeros_and_ones():
    assert samples_for([1.0] * 30 + [-1.0] * 12 + [0.0] * 58) == samples_needed(0.18, 0.42)
    assert samples_for([1.0, -1.0]) is None


def draw(rng, n, cost):
    """Control answers at the measured costs and a method that equals the control at `cost`: P(right) is linear in log
    cost, and what is hard for one is hard for the other."""
    hard = rng.normal(0, 0.15, n)
    chance = {c: np.clip(0.4 + 0.2 * math.log(c / 64) / math.log(3) + hard, 0, 1) for c in (*COSTS, cost)}
    columns = [rng.random(n) < chance[c] for c in COSTS]
    return curve_from(columns), rng.random(n) < chance[cost]


def test_the_interval_holds_the_truth_and_the_test_its_level():
    rng = np.random.default_rng(11)
    held = wrong = 0
    trials = 300
    for _ in range(trials):
        cost = float(rng.uniform(70, 570))
        control, method = draw(rng, 200, cost)
        found = compare_at_cost(rows_of(method), cost, control, seed=0)
        held += found["low"] <= 0 <= found["high"]
        wrong += found["p"] < 0.05
    assert 0.915 <= held / trials <= 0.98, "95 percent, give or take 2.7 standard errors"
    assert wrong / trials <= 0.085


def test_a_method_equal_to_the_control_at_its_true_cost_is_not_better():
    """It asked for 64 tokens and holds 235: against random@64 it looks far ahead."""
    rng = np.random.default_rng(5)
    control, method = draw(rng, 2000, 235.0)
    rows = rows_of(method)
    honest, blind = compare_at_cost(rows, 235.0, control, 0), compare_at_cost(rows, 64.0, control, 0)
    assert verdict(honest["difference"], honest["p"], honest["n"]).kind == "alike"
    assert verdict(blind["difference"], blind["p"], blind["n"]).kind == "better"
    assert compare_at_cost(rows, 40.0, control, 0) is None


def test_pairing_is_over_samples_that_all_answered():
    control = curve_from([[0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    del control.scores[0]["s2"]
    found = compare_at_cost(rows_of([1, 1, 0, 1]), math.sqrt(64 * 192), control, 0)
    assert found["n"] == 3 and found["difference"] == pytest.approx((0.5 + 0 + 1) / 3)


def test_area_of_known_curves():
    assert area_weights(COSTS, 64, 576) == pytest.approx([0.25, 0.5, 0.25])
    straight = curve_from([[0.2] * 4, [0.5] * 4, [0.8] * 4])
    for low, high in ((64, 576), (100, 300), (192, 576)):
        level = 0.2 + 0.3 * (math.log(low / 64) + math.log(high / 64)) / 2 / math.log(3)
        area = area_of(straight, (low, high), None, 0)
        assert area["value"] == area["low"] == pytest.approx(level) and area["whole"]
    part = area_of(straight, (16, 576), curve_from([[0.1] * 4] * 4, [16, *COSTS]), 0)
    assert not part["whole"] and part["from"] == 64 and part["vs_random"] == pytest.approx(0.4)
    assert area_of(straight, (1, 10), None, 0) is None


def test_area_keeps_pairs_together():
    rng = np.random.default_rng(2)
    base = rng.random((3, 300)) < 0.5
    lifted = base | (rng.random((3, 300)) < 0.1)
    area = area_of(curve_from(lifted), (64, 576), curve_from(base), 0)
    spread = area["vs_random_high"] - area["vs_random_low"]
    assert area["vs_random_low"] > 0 and spread < 0.5 * (area["high"] - area["low"])


@pytest.mark.parametrize("n", [1, 6, LEAST_SAMPLES - 1])
def test_few_samples_never_tell_apart(n):
    said = verdict(1.0, 1e-9, n, 7)
    assert said.kind == "few" and said.sentence == f"not enough samples (needs about {LEAST_SAMPLES})"


def test_verdicts():
    assert verdict(0.1, 0.01, 500).kind == "better" and verdict(-0.1, 0.01, 500).kind == "worse"
    assert verdict(0.1, 0.2, 500, 900).sentence == "not told apart (needs about 900 samples)"
    assert verdict(None, None, None).sentence == "no control measured at this cost"
