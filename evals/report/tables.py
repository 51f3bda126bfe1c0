"""The results of a run as a table in the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from tokenprune.evals.config.points import NONE
from tokenprune.evals.results.equal_cost import equal_cost_verdict, is_control
from tokenprune.evals.results.records import ResultRecord
from tokenprune.evals.results.summary import flat_costs, metric_names, title_of

_HEADS = ("method", "tokens", "accuracy %", "95 % interval", "of unpruned %", "vs random*", "verdict*", "hard %",
          "headroom %", "GFLOPs", "KV KiB", "prefill ms", "select ms", "decode ms", "/ ideal", "failed")  # fmt: skip
# columns that a narrow terminal goes without, in this order; never the interval, without which an accuracy says little
_DISPENSABLE = tuple(
    _HEADS.index(name)
    for name in ("decode ms", "select ms", "KV KiB", "headroom %", "of unpruned %", "hard %", "/ ideal", "prefill ms",
                 "vs random*", "GFLOPs", "verdict*")
)  # fmt: skip

_NOTES = {
    "verdict*": "* at the same visual tokens, averaged over the decoder's layers",
    "/ ideal": "/ ideal: the prefill against that of a prompt of only the kept tokens; 1 where choosing costs nothing",
}


def _cells(record: ResultRecord) -> list[str]:
    scores, costs = record["overall"], flat_costs(record)

    def show(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    vs_random = said = ""
    entry = record.get("equal_cost", {}).get("tokens", {}).get("random")
    if entry is not None:
        vs_random = f"{100 * entry['difference']:+.1f} ({100 * entry['low']:+.1f} to {100 * entry['high']:+.1f})"
        said = equal_cost_verdict(record, "random").sentence("it")
    unpruned = record["method"] == NONE
    return [
        "unpruned" if unpruned else record["series"],
        f"{record['kept_tokens']:g}",
        f"{100 * scores['accuracy']:.1f}",
        f"{100 * scores['ci_low']:.1f} to {100 * scores['ci_high']:.1f}",
        "" if scores["relative"] is None else f"{100 * scores['relative']:.1f}",
        vs_random,
        said,
        "" if scores["discriminating"] is None else f"{100 * scores['discriminating']:.1f}",
        "" if scores["headroom_won"] is None else f"{100 * scores['headroom_won']:.0f}",
        show(costs["gflops_total"], "{:.3f}"),
        "" if costs["kv_bytes"] is None else f"{costs['kv_bytes'] / 1024:.0f}",
        show(costs["prefill_ms"], "{:.1f}"),
        "" if unpruned else show(costs["selection_ms"], "{:.2f}"),
        show(costs["decode_ms"], "{:.2f}"),
        show(costs["prefill_to_ideal"], "{:.2f}"),
        str(record.get("failed") or ""),
    ]


def _metric_cells(record: ResultRecord, names: list[str]) -> list[str]:
    """The task's own metrics, in its units."""
    metrics = record.get("metrics") or {}
    return [f"{metrics[name]:.4g}" if name in metrics else "" for name in names]


def result_tables(records: list[ResultRecord], width: int = 200) -> list[Table]:
    """One table per model and task for a terminal of `width` characters.

    Columns that hold nothing are left out, and so are the least telling ones where the terminal is too narrow; all of
    them are in summary.csv.
    """
    tables = []
    for model, task in dict.fromkeys((record["model"], record["task"]) for record in records):
        panel = [record for record in records if (record["model"], record["task"]) == (model, task)]
        metrics = metric_names(panel)
        heads = [*_HEADS, *metrics]
        rows = [[*_cells(record), *_metric_cells(record, metrics)] for record in panel]
        used = [i for i in range(len(heads)) if any(row[i] for row in rows)]
        for index in _DISPENSABLE:
            if sum(2 + max(len(heads[i]), *(len(row[i]) for row in rows)) for i in used) <= width:
                break
            used = [i for i in used if i != index]
        notes = [note for head, note in _NOTES.items() if _HEADS.index(head) in used]
        seeds = list(dict.fromkeys(record["seed"] for record in panel if is_control(record, "random")))
        if len(seeds) > 1 and _HEADS.index("vs random*") in used:
            notes.append(f"* random of the same seed; of a method that draws nothing, of the first, {seeds[0]}")
        table = Table(title=title_of(panel[0]), title_justify="left", caption="\n".join(notes) or None,
                      caption_justify="left", box=None, pad_edge=False)  # fmt: skip
        for i in used:
            table.add_column(heads[i], justify="left" if i == 0 else "right", no_wrap=True)
        for record, row in zip(panel, rows, strict=True):
            table.add_row(*(escape(row[i]) for i in used), style="dim" if record["reference"] else None)
        tables.append(table)
    return tables
