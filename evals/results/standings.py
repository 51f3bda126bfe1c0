"""Who stands where at one cost: every series' accuracy there, and which cannot be told apart from the best."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenprune.evals.config.points import NONE
from tokenprune.evals.results.equal_cost import Panel, cost_of, is_control
from tokenprune.evals.results.records import ResultRecord
from tokenprune.evals.results.summary import flat_costs
from tokenprune.evals.statistics.bootstrap import Interval, bootstrap_mean
from tokenprune.evals.statistics.equal_cost import difference
from tokenprune.evals.statistics.significance import holm
from tokenprune.evals.statistics.verdict import ALIKE, LEAST, Verdict, verdict


@dataclass(frozen=True)
class Standing:
    """A series at one cost.

    Attributes:
        series: its name.
        accuracy: with its interval, interpolated where the cost lies between two budgets.
        against_best: what may be said of it against the best one; "alike" for the best itself.
        selection: milliseconds of choosing, median over its points; None where not measured.
    """

    series: str
    accuracy: Interval
    against_best: Verdict
    selection: float | None


def costs_to_show(panel: Panel, axis: str = "tokens") -> list[tuple[ResultRecord, float]]:
    """The points of random (of several seeds the first), or else of the first series, with their costs, the largest
    first: the costs at which a reader is told who stands where."""
    drawn = [record["series"] for record in panel.records if is_control(record, "random")]
    shown = next(iter([*drawn, *panel.series()]), None)
    found = [(r, cost_of(r, axis)) for r in panel.records if r["series"] == shown]
    return sorted(((r, cost) for r, cost in found if cost is not None), key=lambda each: -each[1])


def standings(panel: Panel, names: Sequence[str], cost: float, axis: str, seed: int = 0) -> list[Standing]:
    """The series that were measured around a cost, the most accurate first, over the samples that all of them answered:
    runs on one page may have asked different numbers. None is extrapolated.

    p-values against the best are corrected for all series of the list. The best is chosen by the same samples, so a
    verdict on one that is far below is safe and one on a close rival is not: that is what "alike" says.
    """
    found: dict[str, dict[str, float]] = {}
    for name in names:
        scores = panel.curve(name, axis).scores_at(cost)
        if scores:
            found[name] = scores
    common = shared_samples(found.values())
    if not common:
        return []
    found = {name: {sample: scores[sample] for sample in common} for name, scores in found.items()}
    means = {name: sum(scores.values()) / len(scores) for name, scores in found.items()}
    ranked = sorted(found, key=lambda name: (-means[name], names.index(name)))
    best, others = ranked[0], ranked[1:]
    tests = {}
    for name in others:
        paired = np.array([found[name][sample] - found[best][sample] for sample in common])
        tests[name] = difference(paired, (cost, cost), seed)
    corrected = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    list_of = []
    for name in ranked:
        said = Verdict(ALIKE) if name == best else verdict(None, None, 0)
        if name in tests:
            said = verdict(tests[name].value, corrected[name], tests[name].n, tests[name].needed)
        interval = bootstrap_mean(list(found[name].values()), seed)
        list_of.append(Standing(name, interval, said, _selection(panel, name)))
    return list_of


def shared_samples(scores: Collection[Mapping[str, float]]) -> list[str]:
    """Samples that all of them have, in the order of the first."""
    first, *others = scores or [{}]
    return [sample for sample in first if all(sample in other for other in others)]


def _selection(panel: Panel, series: str) -> float | None:
    times: list[Any] = [flat_costs(r)["selection_ms"] for r in panel.records if r["series"] == series]
    known = [time for time in times if time is not None]
    return float(np.median(known)) if known else None


def recommended(panel: Panel, names: Sequence[str], axis: str = "tokens", seed: int = 0) -> list[dict[str, Any]]:
    """At each shown cost the series that are as good as the best, the one that chooses fastest first.

    Args:
        names: those that may be recommended: methods, not controls or references.

    Returns:
        For each cost: `keep` of the point that gave it, `cost`, `best`, `recommended` (names), `accuracy` of the best,
        and `enough`, False where there are too few samples to tell anything apart.
    """
    rows = []
    for record, cost in costs_to_show(panel, axis):
        if record["method"] == NONE:
            continue
        table = standings(panel, names, cost, axis, seed)
        if not table:
            continue
        enough = table[0].accuracy.n >= LEAST
        alike = [each for each in table if each.against_best.kind == ALIKE]
        alike.sort(key=lambda each: (each.selection is None, each.selection or 0.0))
        rows.append(
            {
                "keep": record["keep"],
                "cost": cost,
                "best": table[0].series,
                "accuracy": table[0].accuracy.value,
                "recommended": [each.series for each in alike] if enough else [],
                "enough": enough,
            }
        )
    return rows
