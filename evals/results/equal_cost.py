"""Every point against the controls at its own cost, and every series' area under accuracy over cost.

The cost is what a point was measured to cost, not the budget that was asked for: a method that cuts inside the decoder
holds more tokens on average than its last cut leaves, and is held against controls that hold as many.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from tokenprune.evals.config.points import NONE
from tokenprune.evals.io.digest import digest
from tokenprune.evals.io.rows import SampleRow
from tokenprune.evals.results.records import AreaUnderCurve, EqualCost, ResultRecord
from tokenprune.evals.results.scores import answered
from tokenprune.evals.statistics.bootstrap import bootstrap_mean, paired_difference
from tokenprune.evals.statistics.equal_cost import Curve
from tokenprune.evals.statistics.significance import holm
from tokenprune.evals.statistics.verdict import Verdict, verdict

CONTROLS = ("random", "uniform", "downsample")
"""What every point is held against, where the run has them."""
AXES = ("tokens", "flops")
"""Kinds of cost: mean visual tokens over the decoder's layers, and FLOPs to the first token."""


def cost_of(record: ResultRecord, axis: str) -> float | None:
    """What a point was measured to cost; None where it was not, or where a part of it is not modelled."""
    if axis == "tokens":
        return float(record["kept_tokens"]) or None
    flops = record.get("flops")
    total = flops["analytic"]["total"] if flops else None
    return None if total is None else float(total)


def is_control(record: ResultRecord, name: str) -> bool:
    """Whether a point is of this control, without options, whatever its seed."""
    return record["method"] == name and not record["options"]


def scores_by_id(rows: Sequence[SampleRow]) -> dict[str, float]:
    """Scores of the samples that count."""
    return {row["sample_id"]: float(row["correct"]) for row in answered(rows)}


class Panel:
    """The points of one model and task."""

    def __init__(self, records: Sequence[ResultRecord], rows: Mapping[str, Sequence[SampleRow]]) -> None:
        self.records = [record for record in records if record["point"] in rows]
        self.scores = {record["point"]: scores_by_id(rows[record["point"]]) for record in self.records}

    def curve(self, series: str, axis: str) -> Curve:
        """The points of a series and the unpruned model, which is where every series ends."""
        return self._curve([record for record in self.records if record["series"] == series], axis)

    def control(self, name: str, axis: str, seed: int | None = None) -> Curve:
        """The curve that a point with this seed is held against: at each budget the control of the same seed, else the
        first one (of several seeds, each is a series of its own)."""
        chosen: dict[str, ResultRecord] = {}
        for record in self.records:
            if is_control(record, name):
                first = chosen.setdefault(str(record["keep"]), record)
                if record["seed"] == seed != first["seed"]:
                    chosen[str(record["keep"])] = record
        return self._curve(list(chosen.values()), axis)

    def _curve(self, records: Sequence[ResultRecord], axis: str) -> Curve:
        ends = [record for record in self.records if record["method"] == NONE]
        costs = [(cost_of(record, axis), self.scores[record["point"]]) for record in (*records, *ends)]
        return Curve([(cost, scores) for cost, scores in costs if cost is not None])

    def series(self) -> list[str]:
        """Names of the series, in their order."""
        return list(dict.fromkeys(record["series"] for record in self.records if record["method"] != NONE))

    def competing(self) -> list[str]:
        """The series that are held against each other: of several seeds of a method, the first, since the others are
        that method over again."""
        first: dict[str, str] = {}
        for record in self.records:
            if record["method"] != NONE:
                first.setdefault(digest([record["method"], record["options"]]), record["series"])
        return list(first.values())

    def span(self, axis: str) -> tuple[float, float] | None:
        """From the cost of random (or, without it, of any series) at its smallest budget to that at its largest."""
        drawn = [record for record in self.records if is_control(record, "random")]
        costs = [cost_of(record, axis) for record in drawn or self.records if record["method"] != NONE]
        known = [cost for cost in costs if cost is not None]
        return (min(known), max(known)) if known and min(known) < max(known) else None


def panels(
    records: Sequence[ResultRecord], rows: Mapping[str, Sequence[SampleRow]]
) -> Iterable[tuple[Panel, list[ResultRecord]]]:
    """One for each model and task."""
    for key in dict.fromkeys((record["model"], record["task"]) for record in records):
        mine = [record for record in records if (record["model"], record["task"]) == key]
        yield Panel(mine, rows), mine


def compare_at_equal_cost(records: Sequence[ResultRecord], rows: Mapping[str, Sequence[SampleRow]], seed: int) -> None:
    """Fill `equal_cost` and `area` of the records.

    p-values are corrected over all points of a model and task that are held against one control by one kind of cost.
    """
    for panel, mine in panels(records, rows):
        for axis in AXES:
            for control in CONTROLS:
                _against_control(panel, mine, axis, control, seed)
            _areas(panel, mine, axis, seed)


def _against_control(panel: Panel, records: Sequence[ResultRecord], axis: str, control: str, seed: int) -> None:
    if not any(is_control(record, control) for record in panel.records):
        return
    filled: list[EqualCost] = []
    curves: dict[int | None, Curve] = {}
    for record in records:
        cost = cost_of(record, axis)
        if record["method"] == NONE or is_control(record, control) or record["point"] not in panel.scores:
            continue
        if record["seed"] not in curves:
            curves[record["seed"]] = panel.control(control, axis, record["seed"])
        found = None
        if cost is not None:
            found = curves[record["seed"]].against(panel.scores[record["point"]], cost, seed)
        if found is None:
            continue
        entry: EqualCost = {
            "difference": found.value, "low": found.low, "high": found.high, "n": found.n, "p": found.p,
            "holm": found.p, "needed": found.needed, "from": found.between[0], "to": found.between[1],
        }  # fmt: skip
        record.setdefault("equal_cost", {}).setdefault(axis, {})[control] = entry
        filled.append(entry)
    for entry, corrected in zip(filled, holm([entry["p"] for entry in filled]), strict=True):
        entry["holm"] = corrected


def _areas(panel: Panel, records: Sequence[ResultRecord], axis: str, seed: int) -> None:
    span = panel.span(axis)
    if span is None:
        return
    areas = {series: panel.curve(series, axis).area(*span) for series in panel.series()}
    for series, by_id in areas.items():
        if not by_id:
            continue
        first = next(record for record in panel.records if record["series"] == series)
        drawn = None if is_control(first, "random") else panel.control("random", axis, first["seed"]).area(*span)
        mean = bootstrap_mean(list(by_id.values()), seed)
        entry = {
            "value": mean.value, "low": mean.low, "high": mean.high, "from": span[0], "to": span[1],
            "vs_random": None, "vs_random_low": None, "vs_random_high": None,
        }  # fmt: skip
        if drawn:
            common = [name for name in by_id if name in drawn]
            against = paired_difference([by_id[name] for name in common], [drawn[name] for name in common], seed)
            entry |= {"vs_random": against.value, "vs_random_low": against.low, "vs_random_high": against.high}
        for record in records:
            if record["series"] == series:
                record.setdefault("area", {})[axis] = cast(AreaUnderCurve, entry)


def equal_cost_verdict(record: ResultRecord, control: str, axis: str = "tokens") -> Verdict:
    """What may be said of a point against a control at its cost."""
    entry = record.get("equal_cost", {}).get(axis, {}).get(control)
    if entry is None:
        return verdict(None, None, 0)
    return verdict(entry["difference"], entry["holm"], entry["n"], entry["needed"])


def flat_equal_cost(record: ResultRecord) -> dict[str, Any]:
    """Columns of `summary.csv`: `at_tokens_vs_random`, its interval, p-value and verdict, and so on; areas."""
    flat: dict[str, Any] = {}
    for axis in AXES:
        for control in CONTROLS:
            entry = cast(Mapping[str, Any], record.get("equal_cost", {}).get(axis, {}).get(control) or {})
            name = f"at_{axis}_vs_{control}"
            flat[name] = entry.get("difference")
            for part in ("low", "high", "p", "holm", "needed"):
                flat[f"{name}_{part}"] = entry.get(part)
            flat[f"{name}_verdict"] = equal_cost_verdict(record, control, axis).kind if entry else None
        area = cast(Mapping[str, Any], record.get("area", {}).get(axis) or {})
        for part in ("", "_low", "_high", "_from", "_to", "_vs_random", "_vs_random_low", "_vs_random_high"):
            flat[f"area_{axis}{part}"] = area.get(part.lstrip("_") or "value")
    return flat
