"""The leaderboard: one row a point, its columns in four groups of which the page shows one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, cast

from tokenprune.evals.io.rows import Quartiles
from tokenprune.evals.report.html import Cell, Column, number, p_value, percent, spread, table
from tokenprune.evals.report.series import budget_of, kind_of, name_of, off_budget
from tokenprune.evals.results.equal_cost import CONTROLS, equal_cost_verdict
from tokenprune.evals.results.records import ResultRecord
from tokenprune.evals.results.summary import flat_costs
from tokenprune.evals.statistics.verdict import ALIKE, BETTER, FEW, UNKNOWN, WORSE, Verdict, verdict
from tokenprune.interfaces.budget import budget_size

GROUPS = (("g-acc", "Accuracy"), ("g-test", "Tests"), ("g-cost", "Cost"), ("g-time", "Times"))
COLUMNS = (
    Column("method", "press a name for what it is and how to apply it; grey dot: a control; ring: a reference that is "
           "told where the answer is"),
    Column("tokens", "visual tokens that the decoder sees, averaged over its layers and the samples"),
    Column("asked", "the budget that was asked for; a method that cuts inside the decoder holds more on average"),
    Column("accuracy, %", "with its 95 percent bootstrap interval over samples"),
    Column("", "the accuracy and its interval from 0 to 100; the line is the unpruned model", "g-acc wide"),
    Column("of unpruned, %", "accuracy as a share of the unpruned model's", "g-acc"),
    Column("vs random, tokens", "points above random at the same mean tokens, interpolated between its budgets, with "
           "its 95 percent paired bootstrap interval; coloured where the two are told apart", "g-acc"),
    Column("vs random, FLOPs", "the same at the same FLOPs to the first token", "g-acc"),
    Column("vs downsample, FLOPs", "points above downsampling at the same FLOPs to the first token", "g-acc"),
    Column("area", "mean accuracy over the logarithm of the tokens, over the budgets of random; of the whole series, "
           "and empty where it does not cover them", "g-acc"),
    Column("hard samples, %", "accuracy on the discriminating subset: samples that downsample at the same budget gets "
           "wrong. Count behind the bar", "g-acc"),
    Column("headroom won, %", "(method - random) / (oracle - random) at the same budget; empty where the headroom is "
           "too small to divide by", "g-acc"),
    Column("vs unpruned, points", "paired difference with its 95 percent bootstrap interval", "g-test"),
    Column("won / lost", "samples that this point gets right and the unpruned model wrong / the other way round",
           "g-test"),
    Column("p", "exact McNemar test against the unpruned model", "g-test"),
    Column("p, Holm", "corrected for all points of this table", "g-test"),
    Column("samples needed", "to show the difference observed with 80 percent power", "g-test"),
    *(column for control in CONTROLS for column in (
        Column(f"vs {control}, points", "paired difference at the same mean tokens, with its 95 percent bootstrap "
               "interval", "g-test"),
        Column("verdict", "at the same mean tokens: by the corrected test, and with enough samples", "g-test"),
        Column("p, Holm", "exact McNemar test, or sign flips where the control is interpolated; corrected for all "
               "points of this table", "g-test"),
    )),
    Column("GFLOPs", "to the first token: vision tower, projector, selection and prefill", "g-cost"),
    Column("of unpruned, %", "share of the unpruned model's FLOPs to the first token", "g-cost"),
    Column("decoder, GFLOPs", "selection and prefill: what the kept tokens decide", "g-cost"),
    Column("KV cache, KiB", "of one prompt after prefill", "g-cost"),
    Column("of unpruned, %", "share of the unpruned model's KV cache", "g-cost"),
    Column("prefill, ms", "median over single prompts, quartiles behind it", "g-time"),
    Column("of unpruned, %", "taken within a round in which unpruned, pruned and ideal take turns", "g-time"),
    Column("of ideal, %", "the ideal runs tower and projector on the same picture, then the decoder on just the kept "
           "tokens", "g-time"),
    Column("selection, ms", "time of choosing", "g-time"),
    Column("decode, ms/token", "of a generated token", "g-time"),
)  # fmt: skip


def leaderboard(records: list[ResultRecord]) -> str:
    """The table of one model and task, the most expensive first: by visual tokens averaged over layers."""
    unpruned = next((r["overall"]["accuracy"] for r in records if name_of(r) == "unpruned"), None)
    rows = []
    for record in sorted(records, key=lambda r: (-r["kept_tokens"], -r["overall"]["accuracy"])):
        name, kind = name_of(record), kind_of(record["method"])
        budget = budget_of(record)
        attributes = f' data-point="{escape(record["label"])}" data-budget="{escape(budget)}" class="{kind}"'
        rows.append(
            (
                attributes,
                [
                    _name(name, kind),
                    *_accuracy(record, unpruned, off_budget(record, records)),
                    *_tests(record),
                    *_costs(record),
                ],
            )
        )
    return table(COLUMNS, rows, "leaderboard show-g-acc")


def _name(name: str, kind: str) -> Cell:
    button = f'<button type="button" class="name" aria-haspopup="dialog">{escape(name)}</button>'
    return Cell(f'<i class="dot {kind}" data-series="{escape(name)}"></i>{button}', name)


def _accuracy(record: ResultRecord, unpruned: float | None, asked: str) -> list[Cell]:
    scores = record["overall"]
    at = f"--low:{scores['ci_low']:.4f};--high:{scores['ci_high']:.4f};--at:{scores['accuracy']:.4f}"
    line = "" if unpruned is None else f"--base:{unpruned:.4f}"
    hard = ""
    if scores["discriminating"] is not None:
        hard = percent(scores["discriminating"]) + spread(scores["discriminating_low"], scores["discriminating_high"])
    n = scores["discriminating_n"]
    off = f" <small>not {escape(asked)}</small>" if asked else ""
    return [
        Cell(number(record["kept_tokens"], ".4g") + off, float(record["kept_tokens"])),
        Cell(escape(budget_of(record)), budget_size(record["keep"]) if record["keep"] is not None else None),
        Cell(percent(scores["accuracy"]) + spread(scores["ci_low"], scores["ci_high"]), scores["accuracy"]),
        Cell(f'<i class="whisker" style="{at};{line}"></i>', scores["accuracy"]),
        Cell(percent(scores["relative"]), scores["relative"]),
        _at_cost(record, "random", "tokens"),
        _at_cost(record, "random", "flops"),
        _at_cost(record, "downsample", "flops"),
        _area(record),
        Cell(hard, scores["discriminating"], title="" if n is None else f"{n} samples"),
        Cell(
            percent(scores["headroom_won"], 0) + spread(scores["headroom_won_low"], scores["headroom_won_high"]),
            scores["headroom_won"],
        ),
    ]


def _difference(scores: Mapping[str, Any], name: str) -> Cell:
    value, low, high = (scores[name + part] for part in ("", "_low", "_high"))
    if value is None:
        return Cell()
    return Cell(percent(value, sign=True) + spread(low, high, sign=True), value, _COLOUR[_verdict(scores, name).kind])


_COLOUR = {BETTER: "good", WORSE: "bad", ALIKE: "", FEW: "few", UNKNOWN: ""}


def _verdict(scores: Mapping[str, Any], name: str) -> Verdict:
    return verdict(scores[name], scores[f"{name}_holm"], scores["n"], scores[f"{name}_needed"])


def _at_cost(record: ResultRecord, control: str, axis: str) -> Cell:
    entry = record.get("equal_cost", {}).get(axis, {}).get(control)
    if entry is None:
        return Cell("", title="" if kind_of(record["method"]) == "unpruned" else "no control measured at this cost")
    said = equal_cost_verdict(record, control, axis)
    text = percent(entry["difference"], sign=True) + spread(entry["low"], entry["high"], sign=True)
    return Cell(text, entry["difference"], _COLOUR[said.kind], title=said.sentence(control))


def _area(record: ResultRecord) -> Cell:
    area = record.get("area", {}).get("tokens")
    if area is None:
        return Cell()
    return Cell(percent(area["value"]) + spread(area["low"], area["high"]), area["value"])


def _tests(record: ResultRecord) -> list[Cell]:
    scores = cast(Mapping[str, Any], record["overall"])  # names of keys are put together here
    cells: list[Cell] = []
    name = "vs_unpruned"
    won, lost, p, holm = (scores[f"{name}_{part}"] for part in ("won", "lost", "p", "holm"))
    sure = scores[name] is not None and _verdict(scores, name).told_apart
    cells += [
        _difference(scores, name),
        Cell("" if won is None else f"{won} / {lost}", None if won is None else won - lost),
        Cell(p_value(p), p),
        Cell(p_value(holm), holm, "sure" if sure else ""),
    ]
    needed = scores["vs_unpruned_needed"]
    cells.append(Cell("" if needed is None else f"{needed:,}".replace(",", "\u202f"), needed))
    for control in CONTROLS:
        entry = record.get("equal_cost", {}).get("tokens", {}).get(control)
        said = equal_cost_verdict(record, control)
        corrected = None if entry is None else entry["holm"]
        cells += [
            _at_cost(record, control, "tokens"),
            Cell("" if entry is None else said.sentence("it"), title=control),
            Cell(p_value(corrected), corrected, "sure" if said.told_apart else ""),
        ]
    return cells


def _costs(record: ResultRecord) -> list[Cell]:
    costs, times = flat_costs(record), record.get("times") or {}
    parts = (costs["gflops_prefill"], costs["gflops_selection"])
    decoder = None if None in parts else sum(parts)
    kv = None if costs["kv_bytes"] is None else costs["kv_bytes"] / 1024
    return [
        Cell(number(costs["gflops_total"], ".4g"), costs["gflops_total"]),
        Cell(percent(costs["flops_share"]), costs["flops_share"]),
        Cell(number(decoder, ".4g"), decoder),
        Cell(number(kv, ",.0f"), kv),
        Cell(percent(costs["kv_share"]), costs["kv_share"]),
        *(_time(times.get(name), scale) for name, scale in (
            ("prefill", 1000), ("to_unpruned", 100), ("to_ideal", 100), ("selection", 1000), ("decode", 1000),
        )),
    ]  # fmt: skip


def _time(quartiles: Quartiles | None, scale: int) -> Cell:
    if quartiles is None:
        return Cell()
    middle, low, high = (scale * quartiles[part] for part in ("median", "q25", "q75"))
    return Cell(f"{middle:.3g} <small>{low:.3g} to {high:.3g}</small>", middle)
