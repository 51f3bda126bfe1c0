"""What is folded away at the end of a panel: accuracies by question family, and FLOPs by part of the model."""

from __future__ import annotations

from html import escape

from tokenprune.cost import NOT_MODELLED
from tokenprune.evals.report.html import Cell, Column, number, table
from tokenprune.evals.report.series import budget_of, name_of
from tokenprune.evals.results.records import ResultRecord
from tokenprune.evals.statistics.significance import holm
from tokenprune.evals.statistics.verdict import BETTER, WORSE, verdict

PARTS = ("vision", "projector", "selection", "prefill", "total", "decode")


def family_table(records: list[ResultRecord]) -> str:
    """Accuracy by question family, tinted where that is told apart from the unpruned model."""
    families = list(dict.fromkeys(family for record in records for family in record["families"]))
    columns = [Column("method"), Column("budget"), *(Column(family) for family in families), Column("overall")]
    everything = [scores for record in records for scores in [*record["families"].values(), record["overall"]]]
    tested = [scores for scores in everything if scores["vs_unpruned_p"] is not None]
    corrected = dict(zip(map(id, tested), holm([scores["vs_unpruned_p"] or 0.0 for scores in tested]), strict=True))
    rows = []
    for record in records:
        cells = [Cell(escape(name_of(record)), name_of(record)), Cell(escape(budget_of(record)), budget_of(record))]
        for scores in [*(record["families"].get(family) for family in families), record["overall"]]:
            if scores is None:
                cells.append(Cell())
                continue
            lost = scores["vs_unpruned"] or 0.0
            # full colour at 40 points
            strength = round(100 * min(1.0, abs(lost) / 0.4) * 0.5)
            title = f"{100 * scores['ci_low']:.1f} to {100 * scores['ci_high']:.1f}, {scores['n']} questions"
            said = verdict(scores["vs_unpruned"], corrected.get(id(scores)), scores["n"])
            kind = {BETTER: "won", WORSE: "lost"}.get(said.kind)
            text = f"{100 * scores['accuracy']:.1f}"
            if kind is not None:
                text = f'<span class="tint {kind}" style="--by:{strength}%">{text}</span>'
            cells.append(Cell(text, scores["accuracy"], title=title))
        rows.append((f' data-budget="{escape(budget_of(record))}"', cells))
    return table(columns, rows, "plain")


def _counted(value: float | None) -> Cell:
    return Cell(NOT_MODELLED) if value is None else Cell(number(value / 1e9, ".4g"), value / 1e9)


def flops_table(records: list[ResultRecord]) -> str:
    """GFLOPs of one prompt by part; "" where none were counted."""
    heads = ("method", "budget", *PARTS[:-1], "decode, per token", "papers' formula", "measured off by")
    rows = []
    for record in records:
        flops = record.get("flops")
        if not flops:
            continue
        cells = [Cell(escape(name_of(record)), name_of(record)), Cell(escape(budget_of(record)), budget_of(record))]
        for part in PARTS:
            cells.append(_counted(flops["analytic"][part]))
        cells.append(_counted(flops["paper"]))
        measured = flops["measured"] or {}
        # 0 beside 0 (a method without matrix products) compares nothing
        off = [value for part, value in (flops["difference"] or {}).items() if value or measured.get(part, 1)]
        worst = max(off, key=abs, default=None)
        cells.append(Cell("" if worst is None else f"{worst:+.2%}", worst))
        rows.append((f' data-budget="{escape(budget_of(record))}"', cells))
    if not rows:
        return ""
    explained = (
        '<p class="soft">GFLOPs of one prompt. Matrix products only, 2 per multiply-add, attention as the full square, '
        "as torch counts them in FlopCounterMode. The last column is the largest difference of a part between the "
        "analytic and the measured count. The papers' simplified formula counts decoder layers only and a multiply-add "
        "once. A part whose cost the model's sizes do not say is not modelled.</p>"
    )
    return explained + table([Column(head) for head in heads], rows, "plain")
