"""Every point against the controls at its own cost, and the area under each method's curve.

Two costs are looked at: visual tokens, averaged over the decoder's layers and the samples (`kept_tokens`, which counts
what a method that cuts inside the decoder holds before its cuts), and FLOPs to the first token. A control's score
there is interpolated between its neighbouring budgets, see `statistics.curve`; the unpruned model is a point of every
curve. Where no control was measured at a cost there is no comparison: nothing is extrapolated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from tokenprune.evals.config.points import NONE
from tokenprune.evals.results.records import Area, AtCost, ResultRecord
from tokenprune.evals.results.scores import Rows, answered
from tokenprune.evals.statistics.bootstrap import Interval, bootstrap_mean
from tokenprune.evals.statistics.curve import NEAR, area_weights, weights_at
from tokenprune.evals.statistics.significance import holm, samples_for, sign_flip
from tokenprune.evals.statistics.verdict import Verdict, verdict

CONTROLS = ("random", "uniform", "downsample")
AXES = ("tokens", "flops")
"""Mean visual tokens over layers, and FLOPs to the first token."""


def cost_of(record: ResultRecord, axis: str) -> float | None:
    """The cost of a point; None where it was not measured."""
    if axis == "tokens":
        return float(record["kept_tokens"]) or None
    flops = record.get("flops")
    return float(flops["analytic"]["total"]) if flops else None


@dataclass
class Curve:
    """The points of one series with increasing cost.

    Attributes:
        costs: of the points.
        scores: of each point by sample.
    """

    costs: list[float]
    scores: list[dict[str, float]]

    def weighted(self, weights: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """The weighted sum of each sample's scores."""
        used = [(weight, scores) for weight, scores in zip(weights, self.scores, strict=True) if weight]
        return np.array([sum(weight * scores[name] for weight, scores in used) for name in ids])

    def common(self, weights: np.ndarray) -> list[str]:
        """Samples that every point with a weight has."""
        used = [scores for weight, scores in zip(weights, self.scores, strict=True) if weight]
        return [name for name in used[0] if all(name in other for other in used[1:])]

    def at(self, cost: float, seed: int = 0) -> Interval | None:
        """The accuracy at a cost with its interval; None where it was not measured around it."""
        weights = weights_at(self.costs, cost)
        ids = [] if weights is None else self.common(weights)
        return bootstrap_mean(self.weighted(cast(np.ndarray, weights), ids).tolist(), seed) if ids else None


def curve_of(records: Sequence[ResultRecord], rows: Mapping[str, Rows], axis: str) -> Curve:
    """The curve through these points; of two with the same cost the first."""
    points: dict[float, dict[str, float]] = {}
    for record in records:
        cost = cost_of(record, axis)
        if cost and record["point"] in rows:
            points.setdefault(cost, _scores(rows[record["point"]]))
    return Curve(sorted(points), [points[cost] for cost in sorted(points)])


def _scores(rows: Rows) -> dict[str, float]:
    return {row["sample_id"]: float(row["correct"]) for row in answered(rows)}


def compare_at_cost(rows: Rows, cost: float | None, control: Curve, seed: int) -> AtCost | None:
    """A point against a control at its cost; None where the control was not measured there."""
    weights = None if cost is None else weights_at(control.costs, cost)
    if weights is None:
        return None
    mine, shared = _scores(rows), set(control.common(weights))
    ids = [name for name in mine if name in shared]
    if not ids:
        return None
    theirs = control.weighted(weights, ids)
    differences = (np.array([mine[name] for name in ids]) - theirs).tolist()
    interval = bootstrap_mean(differences, seed)
    return {
        "accuracy": float(theirs.mean()), "difference": interval.value, "low": interval.low, "high": interval.high,
        "n": interval.n, "p": sign_flip(differences, seed), "holm": None, "needed": samples_for(differences),
    }  # fmt: skip


def verdict_at(record: ResultRecord, control: str, axis: str) -> Verdict:
    """What may be said of a point against a control at equal cost."""
    found = (record.get("equal_cost") or {}).get(control, {}).get(axis)
    if found is None:
        return verdict(None, None, None)
    return verdict(found["difference"], found["holm"], found["n"], found["needed"])


def add_equal_cost(records: Sequence[ResultRecord], rows: Mapping[str, Rows], seed: int) -> None:
    """Fill `equal_cost` and `area` of every record.

    Holm's correction is over all points of one model and task against one control at one kind of cost.
    """
    for panel in panels(records):
        for axis in AXES:
            for control in CONTROLS:
                _against(panel, rows, control, axis, seed)
            _areas(panel, rows, axis, seed)


def panels(records: Sequence[ResultRecord]) -> list[list[ResultRecord]]:
    """The records of each model and task."""
    groups: dict[tuple[str, str], list[ResultRecord]] = {}
    for record in records:
        groups.setdefault((record["model"], record["task"]), []).append(record)
    return list(groups.values())


def control_points(panel: Sequence[ResultRecord], control: str, seed: int | None) -> list[ResultRecord]:
    """Points of a control without options: of this seed, else of the first that the run has."""
    found = [record for record in panel if record["method"] == control and not record["options"]]
    seeds = [record["seed"] for record in found]
    chosen = seed if seed in seeds else seeds[0] if seeds else None
    return [record for record in found if record["seed"] == chosen]


def unpruned_of(panel: Sequence[ResultRecord]) -> list[ResultRecord]:
    """The unpruned model's point, if there is one."""
    return [record for record in panel if record["method"] == NONE][:1]


def _against(panel: Sequence[ResultRecord], rows: Mapping[str, Rows], control: str, axis: str, seed: int) -> None:
    curves: dict[int | None, Curve | None] = {}
    tested: list[AtCost] = []
    for record in panel:
        record.setdefault("equal_cost", {}).setdefault(control, {})[axis] = None
        itself = record["method"] == control and not record["options"]
        if record["method"] == NONE or itself or record["point"] not in rows:
            continue
        if record["seed"] not in curves:
            own = control_points(panel, control, record["seed"])
            curves[record["seed"]] = curve_of([*own, *unpruned_of(panel)], rows, axis) if own else None
        curve = curves[record["seed"]]
        found = curve and compare_at_cost(rows[record["point"]], cost_of(record, axis), curve, seed)
        record["equal_cost"][control][axis] = found or None
        if found:
            tested.append(found)
    for found, adjusted in zip(tested, holm([one["p"] for one in tested]), strict=True):
        found["holm"] = adjusted


def series_of(panel: Sequence[ResultRecord]) -> dict[str, list[ResultRecord]]:
    """The points of each series that has a budget."""
    series: dict[str, list[ResultRecord]] = {}
    for record in panel:
        if record["method"] != NONE and record["keep"] is not None:
            series.setdefault(record["series"], []).append(record)
    return series


def series_curves(panel: Sequence[ResultRecord], rows: Mapping[str, Rows], axis: str) -> dict[str, Curve]:
    """The curve of each series, the unpruned model its last point."""
    top = unpruned_of(panel)
    return {name: curve_of([*points, *top], rows, axis) for name, points in series_of(panel).items()}


def area_range(panel: Sequence[ResultRecord], axis: str) -> tuple[float, float] | None:
    """The costs over which areas are taken: from the least to the greatest of `random`'s budgets; of all methods'
    common range where there is no `random`. None with fewer than two budgets."""
    groups = list(series_of(panel).values())
    own = control_points(panel, "random", None)
    spans = []
    for points in [own] if own else groups:
        costs = [cost for cost in (cost_of(record, axis) for record in points) if cost]
        if costs:
            spans.append((min(costs), max(costs)))
    if not spans:
        return None
    low, high = max(span[0] for span in spans), min(span[1] for span in spans)
    return (low, high) if high > low * (1 + NEAR) else None


def _areas(panel: Sequence[ResultRecord], rows: Mapping[str, Rows], axis: str, seed: int) -> None:
    for record in panel:
        record.setdefault("area", {})[axis] = None
    asked = area_range(panel, axis)
    if asked is None:
        return
    curves = series_curves(panel, rows, axis)
    random = curves.get(next((r["series"] for r in control_points(panel, "random", None)), ""))
    for name, points in series_of(panel).items():
        area = area_of(curves[name], asked, None if name == "random" else random, seed)
        for record in points:
            record["area"][axis] = area


def area_of(curve: Curve, asked: tuple[float, float], random: Curve | None, seed: int) -> Area | None:
    """The area of a curve over the range asked for, or over the part of it that was measured, and its paired difference
    to that of `random` over the same part."""
    if not curve.costs:
        return None
    low = asked[0] if curve.costs[0] * (1 - NEAR) <= asked[0] else curve.costs[0]
    high = min(asked[1], curve.costs[-1])
    weights = area_weights(curve.costs, low, high)
    ids = [] if weights is None else curve.common(weights)
    if weights is None or not ids:
        return None
    found = bootstrap_mean(curve.weighted(weights, ids).tolist(), seed)
    area: dict[str, Any] = {
        "value": found.value, "low": found.low, "high": found.high, "from": low, "to": high,
        "whole": (low, high) == asked, "vs_random": None, "vs_random_low": None, "vs_random_high": None,
    }  # fmt: skip
    others = None if random is None else area_weights(random.costs, low, high)
    if random is not None and others is not None:
        shared = set(random.common(others))
        both = [name for name in ids if name in shared]
        if both:
            beside = bootstrap_mean((curve.weighted(weights, both) - random.weighted(others, both)).tolist(), seed)
            area |= {"vs_random": beside.value, "vs_random_low": beside.low, "vs_random_high": beside.high}
    return cast(Area, area)
