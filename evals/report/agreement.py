"""How alike methods answer: the share of equal answers, and Cohen's kappa of right and wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenprune.evals.config.points import NONE
from tokenprune.evals.io.rows import SampleRow
from tokenprune.evals.report.series import budget_of, name_of
from tokenprune.evals.results.records import ResultRecord
from tokenprune.evals.results.scores import answered


def cohen_kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Agreement of two lists of yes and no beyond chance: (observed - expected) / (1 - expected), expected from each
    list's own share of yes. None where both lists are all yes or all no: nothing is left beyond chance.

    Raises:
        ValueError: the lists differ in length, or are empty.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"Kappa needs two lists of the same samples, got {len(first)} and {len(second)}.")
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    observed = float((a == b).mean())
    expected = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    return None if expected == 1.0 else (observed - expected) / (1 - expected)


def agreement(records: list[ResultRecord], rows: dict[str, list[SampleRow]]) -> dict[str, dict[str, Any]]:
    """By budget: `names`, and the matrices `equal` and `kappa` over them, with `n` samples that both answered.

    The unpruned model stands in every budget's matrix; a budget with one method has none.
    """
    matrices: dict[str, dict[str, Any]] = {}
    tables = {record["point"]: _answers(rows[record["point"]]) for record in records if record["point"] in rows}
    for budget in dict.fromkeys(budget_of(record) for record in records if record["keep"] is not None):
        beside = [r for r in records if r["point"] in tables and (r["method"] == NONE or budget_of(r) == budget)]
        if len(beside) < 2:
            continue
        equal: list[list[float | None]] = []
        kappa: list[list[float | None]] = []
        for first in beside:
            pairs = [_pair(tables[first["point"]], tables[second["point"]]) for second in beside]
            equal.append([round(pair[0], 4) if pair else None for pair in pairs])
            kappa.append([None if not pair or pair[1] is None else round(pair[1], 4) for pair in pairs])
        matrices[budget] = {"names": [name_of(record) for record in beside], "equal": equal, "kappa": kappa}
    return matrices


def _answers(rows: list[SampleRow]) -> dict[str, tuple[str, bool]]:
    return {row["sample_id"]: (row["prediction"].strip().lower(), row["correct"] >= 0.5) for row in answered(rows)}


def _pair(first: dict[str, tuple[str, bool]], second: dict[str, tuple[str, bool]]) -> tuple[float, float | None] | None:
    both = [name for name in first if name in second]
    if not both:
        return None
    same = sum(first[name][0] == second[name][0] for name in both) / len(both)
    return same, cohen_kappa([first[name][1] for name in both], [second[name][1] for name in both])
