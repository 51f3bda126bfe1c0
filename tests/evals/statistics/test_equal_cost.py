"""Comparisons at equal cost: what is interpolated, when a verdict is given, and how often it would be wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tokenprune.evals.statistics.equal_cost import Curve
from tokenprune.evals.statistics.significance import holm, mcnemar, sign_test
from tokenprune.evals.statistics.verdict import LEAST, grouped, verdict


def drawn(accuracy: float, ids: range, draw: np.random.Generator) -> dict[str, float]:
    return {str(i): float(draw.random() < accuracy) for i in ids}


def test_scores_between_two_budgets_are_linear_in_log_cost() -> None:
    curve = Curve([(64, {"a": 0.0, "b": 1.0}), (16, {"a": 1.0, "b": 1.0}), (256, {"a": 1.0})])
    assert curve.costs == [16, 64, 256]
    middle = curve.scores_at(32)
    assert middle == pytest.approx({"a": 0.5, "b": 1.0})
    assert curve.scores_at(64.3) == {"a": 0.0, "b": 1.0}, "within a percent it was measured there"
    assert curve.scores_at(128) == pytest.approx({"a": 0.5}), "of the samples that both answered"
    weight = math.log(20 / 16) / math.log(4)
    assert curve.scores_at(20) == pytest.approx({"a": 1 - weight, "b": 1.0})


@pytest.mark.parametrize("cost", [10.0, 300.0])
def test_nothing_is_extrapolated(cost: float) -> None:
    curve = Curve([(16, {"a": 1.0}), (256, {"a": 1.0})])
    assert curve.scores_at(cost) is None and curve.against({"a": 1.0}, cost) is None
    assert curve.area(cost, 256.0 if cost < 256 else 400.0) is None


def test_at_a_measured_cost_the_test_is_mcnemars() -> None:
    draw = np.random.default_rng(0)
    mine, theirs = drawn(0.7, range(200), draw), drawn(0.6, range(200), draw)
    found = Curve([(16, drawn(0.2, range(200), draw)), (64, theirs)]).against(mine, 64)
    assert found is not None
    won = sum(mine[i] > theirs[i] for i in mine)
    lost = sum(mine[i] < theirs[i] for i in mine)
    assert found.p == mcnemar(won, lost) and found.value == pytest.approx((won - lost) / 200)
    assert found.between == (64, 64)


def test_sign_flips_equal_all_signs_counted() -> None:
    differences = np.array([0.25, 0.75, -0.25, 1.0, 0.75, 0.25, 0.75, 0.25, 1.0, -0.75])
    signs = 2 * np.array(list(np.ndindex(*(2,) * 10))) - 1
    sums = np.abs(signs @ np.abs(differences))
    exact = float((sums >= abs(differences.sum()) - 1e-9).mean())
    assert sign_test(differences) == pytest.approx(exact, rel=1e-9)
    assert sign_test(np.zeros(5)) == 1.0


def test_thrown_signs_come_near_the_counted_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(4)
    for n in (20, 80, 200):
        values = draw.choice([1, -1, 0.4, -0.4, 0.6, -0.6, 0], size=n, p=[0.18, 0.12, 0.15, 0.1, 0.15, 0.1, 0.2])
        counted = sign_test(values)
        with monkeypatch.context() as patch:
            patch.setattr("tokenprune.evals.statistics.significance.EXACT", 0)
            assert sign_test(values) == pytest.approx(counted, abs=0.006)
            assert sign_test(np.full(300, 0.5)) > 0


def test_a_method_that_is_the_control_at_its_true_cost_is_seldom_called_better() -> None:
    """A decoder method asked for 64 tokens that holds 128: against random@64 it wins, at its own cost it does not."""
    called = naive = 0
    for seed in range(120):
        draw = np.random.default_rng(seed)
        ids = range(400)
        curve = Curve([(64, drawn(0.5, ids, draw)), (256, drawn(0.7, ids, draw))])
        mine = drawn(0.6, ids, draw)  # on the line, at 128
        found = curve.against(mine, 128)
        assert found is not None
        called += verdict(found.value, found.p, found.n).told_apart
        at_asked = curve.against(mine, 64)
        assert at_asked is not None
        naive += verdict(at_asked.value, at_asked.p, at_asked.n).kind == "better"
    assert called <= 14, "at most 5 percent in truth, 14 of 120 has a chance below 1 in 1000"
    assert naive > 60


def test_intervals_cover_what_they_should() -> None:
    inside = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        curve = Curve([(16, drawn(0.4, range(300), draw)), (64, drawn(0.6, range(300), draw))])
        found = curve.against(drawn(0.65, range(300), draw), 32)
        assert found is not None
        inside += found.low <= 0.65 - 0.5 <= found.high
    assert 180 <= inside <= 199


def test_the_area_is_the_mean_over_log_cost() -> None:
    curve = Curve([(8, {"a": 0.0}), (32, {"a": 1.0}), (128, {"a": 1.0})])
    assert curve.area(8, 128) == pytest.approx({"a": 0.75})
    assert curve.area(16, 32) == pytest.approx({"a": 0.75})
    fine = np.exp(np.linspace(np.log(10), np.log(100), 2001))
    values = [curve.scores_at(float(cost))["a"] for cost in fine]  # type: ignore[index]
    area = curve.area(10, 100)
    assert area is not None and area["a"] == pytest.approx(float(np.mean(values)), abs=2e-3)


@pytest.mark.parametrize("n", [1, 6, 30, LEAST - 1])
def test_no_verdict_from_few_samples(n: int) -> None:
    said = verdict(1.0, 1e-9, n, 20)
    assert said.kind == "few" and not said.told_apart and said.needed == LEAST
    assert "not enough samples (needs about 100)" in said.sentence("random")
    assert verdict(0.1, 1e-9, n, 900).needed == 900


def test_verdicts_need_the_corrected_test() -> None:
    assert verdict(0.1, 0.04, 500).kind == "better" and verdict(-0.1, 0.04, 500).kind == "worse"
    assert verdict(0.1, 0.06, 500).kind == "alike" and verdict(None, None, 500).kind == "unknown"
    p = [0.03] * 5
    assert all(verdict(0.1, each, 500).kind == "alike" for each in holm(p)), "five of them, corrected"
    groups = grouped([("a", verdict(0.1, 0.01, 500)), ("b", verdict(0.1, 0.5, 500))])
    assert verdict(None, None, 0).sentence("control") == "no control measured at this cost"
    assert groups["better"] == ["a"] and groups["alike"] == ["b"]
    assert verdict(0.1, 0.01, 500).sentence("random") == "better than random"
