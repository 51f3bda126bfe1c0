"""The first thing a reader sees: at each cost the best method, and what cannot be told apart from it."""

from __future__ import annotations

from html import escape

from tokenprune.evals.io.rows import SampleRow
from tokenprune.evals.report.html import number, percent
from tokenprune.evals.report.series import budget_of, kind_of
from tokenprune.evals.results.equal_cost import Panel
from tokenprune.evals.results.records import ResultRecord
from tokenprune.evals.results.standings import Standing, costs_to_show, standings
from tokenprune.evals.statistics.verdict import ALIKE, FEW


def findings(records: list[ResultRecord], rows: dict[str, list[SampleRow]]) -> str:
    """One card for each cost of random selection, in visual tokens averaged over the decoder's layers; "" where no
    answers are at hand.

    The best is the series with the highest accuracy there, interpolated between its budgets; references that know where
    the answer is do not compete, nor do further seeds of a method. What is told apart from it is for
    `statistics.verdict` to say.
    """
    panel = Panel(records, rows)
    kinds = {record["series"]: kind_of(record["method"]) for record in panel.records}
    names = [name for name in panel.competing() if kinds[name] != "reference"]
    cards = []
    for record, cost in costs_to_show(panel):
        table = standings(panel, names, cost, "tokens")
        if len(table) > 1:
            cards.append(_card(record, cost, table, kinds))
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _card(record: ResultRecord, cost: float, table: list[Standing], kinds: dict[str, str]) -> str:
    best, others = table[0], table[1:]
    low, high = percent(best.accuracy.low), percent(best.accuracy.high)
    lines = [f"<small>{low} to {high} % of {best.accuracy.n} samples</small>"]
    few = [each for each in others if each.against_best.kind == FEW]
    alike = [escape(each.series) for each in others if each.against_best.kind == ALIKE]
    if few:
        most = max(few, key=lambda each: each.against_best.needed or 0)
        lines.append(most.against_best.sentence(""))
    elif alike:
        lines.append(f"not told apart from it: {', '.join(alike)}")
    else:
        lines.append(f"told apart from all {len(others)} others")
    body = "".join(f"<li>{line}</li>" for line in lines)
    head = "highest" if few else "best"
    return (
        f'<div class="card" data-budget="{escape(budget_of(record))}">'
        f'<div class="soft">{head} at {number(cost, ".4g")} tokens a layer</div>'
        f'<div class="big"><i class="dot {kinds[best.series]}" data-series="{escape(best.series)}"></i>'
        f"{escape(best.series)} <span>{percent(best.accuracy.value)} %</span></div><ul>{body}</ul></div>"
    )
