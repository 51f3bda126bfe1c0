"""The first thing a reader sees: at each budget the best point, its cost, and what cannot be told apart from it."""

from __future__ import annotations

from html import escape

from tokenprune.evals.io.rows import SampleRow
from tokenprune.evals.report.html import percent
from tokenprune.evals.report.series import budget_of, budget_title, budgets, kind_of, name_of
from tokenprune.evals.results.records import ResultRecord
from tokenprune.evals.results.scores import paired
from tokenprune.evals.results.summary import flat_costs
from tokenprune.evals.statistics.significance import compare_paired


def findings(records: list[ResultRecord], rows: dict[str, list[SampleRow]]) -> str:
    """One card per budget; "" where no answers are at hand.

    The best point is that with the highest accuracy, of equal ones the cheapest; upper bounds do not compete. Another
    is told apart from it where the paired 95 percent interval of the difference leaves 0 out.
    """
    cards = []
    for budget in budgets(records):
        rivals = [
            record
            for record in records
            if budget_of(record) == budget and record["point"] in rows and kind_of(record["method"]) != "bound"
        ]
        if len(rivals) > 1:
            cards.append(_card(budget, rivals, rows))
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _card(budget: str, rivals: list[ResultRecord], rows: dict[str, list[SampleRow]]) -> str:
    best = max(rivals, key=lambda r: (r["overall"]["accuracy"], -(flat_costs(r)["gflops_total"] or 0.0)))
    scores, costs = best["overall"], flat_costs(best)
    alike = []
    for record in rivals:
        if record is best:
            continue
        first, second = paired(rows[best["point"]], rows[record["point"]])
        if not first:
            continue
        test = compare_paired(first, second)
        if test.low <= 0 <= test.high:
            alike.append(name_of(record))
    lines = []
    if scores["vs_unpruned"] is not None:
        low, high = (percent(end, 1, True) for end in (scores["vs_unpruned_low"], scores["vs_unpruned_high"]))
        lines.append(
            f"<b>{percent(scores['vs_unpruned'], 1, True)}</b> points to unpruned <small>{low} to {high}</small>"
        )
    shares = [
        f"<b>{percent(costs[name], 0)} %</b> of its {what}"
        for name, what in (("flops_share", "FLOPs"), ("kv_share", "KV cache"))
        if costs[name] is not None
    ]
    if shares:
        lines.append(", ".join(shares))
    names = ", ".join(escape(name) for name in alike)
    lines.append(f"not told apart from it: {names}" if alike else f"told apart from all {len(rivals) - 1} others")
    body = "".join(f"<li>{line}</li>" for line in lines)
    return (
        f'<div class="card" data-budget="{escape(budget)}">'
        f'<div class="soft">best at {escape(budget_title(budget))}</div>'
        f'<div class="big"><i class="dot {kind_of(best["method"])}" data-series="{escape(name_of(best))}"></i>'
        f"{escape(name_of(best))} <span>{percent(scores['accuracy'])} %</span></div><ul>{body}</ul></div>"
    )
