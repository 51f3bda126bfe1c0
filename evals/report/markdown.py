"""The leaderboard as Markdown, for a repository or a paper's appendix; every sentence is computed from the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tokenprune.evals.io.atomic_files import replace_file
from tokenprune.evals.report.html import number
from tokenprune.evals.report.merge import Merged, merge
from tokenprune.evals.report.series import budget_of, kind_of, name_of, off_budget
from tokenprune.evals.results.equal_cost import CONTROLS, Panel, equal_cost_verdict, is_control
from tokenprune.evals.results.records import ResultRecord, Scores
from tokenprune.evals.results.run_folder import FinishedRun
from tokenprune.evals.results.standings import costs_to_show, recommended, shared_samples
from tokenprune.evals.results.summary import flat_costs, title_of
from tokenprune.evals.statistics.bootstrap import Interval, bootstrap_mean
from tokenprune.evals.statistics.equal_cost import Curve
from tokenprune.evals.statistics.verdict import ALIKE, BETTER, FEW, UNKNOWN, WORSE, Verdict, grouped

HEADS = ("method", "asked", "tokens", "accuracy, %", "vs random, tokens", "vs random, FLOPs", "vs uniform, tokens",
         "vs downsample, FLOPs", "GFLOPs", "KV, KiB", "prefill / ideal", "selection, %", "selection, ms",
         "vs uniform, FLOPs", "vs downsample, tokens", "area, %")  # fmt: skip
LEGEND = """\
*Asked*: the budget that was asked for. *Tokens*: visual tokens that the decoder sees, averaged over its layers and the
samples; a method that cuts inside the decoder sees more than its last cut leaves, no verdict is by what was asked, and
a row that is more than 1 percent off it says so.
Accuracy with its 95 percent bootstrap interval. *vs random, tokens*: paired difference to random selection at the same
mean tokens, interpolated between its budgets in the logarithm of the cost, with its interval; *FLOPs*: at the same
FLOPs to the first token. Bold where the two are told apart: an exact McNemar test (sign flips where the control is
interpolated), corrected over the column, and at least 100 samples. Of several seeds of random, that of the method's
own seed, else the first. *Area*: mean accuracy over the logarithm of the cost.
*GFLOPs*: to the first token, vision tower and selection included, and the share of the unpruned model's. *KV*: bytes of
one prompt after prefill, and their share. *prefill / ideal*: against the same counts without any selection.
*Selection*: of the time of the unpruned prefill, and in milliseconds. Controls are in italics; the oracle is told where
the answer is: a reference, and no upper bound."""
_AXES = {"tokens": "mean tokens", "flops": "FLOPs to the first token"}


def write_markdown(path: Path, runs: Sequence[FinishedRun]) -> Path:
    """Write the leaderboard of one or more finished runs, and what it recommends to `PATH.defaults.json` beside it.

    Raises:
        ValueError: see `merge.merge`.
    """
    merged = merge(runs)
    parts = [f"# {merged.title}", _origin(merged), *merged.notes]
    defaults = {}
    for model, task in dict.fromkeys((r["model"], r["task"]) for r in merged.records):
        records = [record for record in merged.records if (record["model"], record["task"]) == (model, task)]
        panel = Panel(records, merged.rows)
        parts += [f"## {title_of(records[0])}", _unpruned(records)]
        for axis in ("flops", "tokens"):
            parts.append(_at_given_cost(panel, axis))
        parts += ["### Every point, by its cost", _table(records)]
        parts += ["### Verdicts at equal cost", _verdicts(records), "### Where methods lose", _losses(records)]
        defaults[title_of(records[0])] = rows = recommended(panel, _methods(panel))
        parts += ["### Which method at which budget", _recommended(rows)]
    replace_file(path.with_suffix(".defaults.json"), json.dumps(defaults, indent=1, ensure_ascii=False) + "\n")
    return replace_file(path, "\n\n".join(part for part in (*parts, LEGEND) if part) + "\n")


def _methods(panel: Panel) -> list[str]:
    """Series that may be recommended: neither controls nor references."""
    kinds = {record["series"]: kind_of(record["method"]) for record in panel.records}
    return [name for name in panel.competing() if kinds[name] == "method"]


def _at_given_cost(panel: Panel, axis: str) -> str:
    """Accuracy of every series at the costs of random selection, the largest area first."""
    shown = costs_to_show(panel, axis)
    if not shown:
        return ""
    costs = list(dict.fromkeys(cost for _, cost in shown))
    form = {"tokens": ".4g", "flops": ".3g"}[axis]
    heads = [number(cost / (1e9 if axis == "flops" else 1), form) for cost in costs]
    areas = {record["series"]: record.get("area", {}).get(axis) for record in panel.records}
    kinds = {record["series"]: kind_of(record["method"]) for record in panel.records}
    curves = {name: panel.curve(name, axis) for name in panel.series()}
    means = [_means_at(curves, cost) for cost in costs]
    lines, over = [], None
    for name in curves:
        cells = [_interval(at[name].value, at[name].low, at[name].high) if name in at else "" for at in means]
        area = areas.get(name)
        over = area or over
        width = "" if area is None else _interval(area["value"], area["low"], area["high"])
        written = _escaped(name)
        first = -(area["value"] if area is not None else -1.0)
        lines.append((first, [f"*{written}*" if kinds[name] == "control" else written, width, *cells]))
    unit = "GFLOPs" if axis == "flops" else "tokens"
    head = f"| method | area, % | {' | '.join(f'{each} {unit}' for each in heads)} |"
    rows = ["| " + " | ".join(cells) + " |" for _, cells in sorted(lines, key=lambda line: line[0])]
    title = f"### Accuracy at given {_AXES[axis]}, %"
    table = [title, "", head, "|---|" + "---:|" * (len(costs) + 1), *rows]
    if over is not None:
        scale = 1e9 if axis == "flops" else 1
        span = f"{number(over['from'] / scale, form)} to {number(over['to'] / scale, form)} {unit}"
        table += ["", f"Area: over {span}; empty for a method that was not measured over all of it."]
    return "\n".join(table)


def _means_at(curves: Mapping[str, Curve], cost: float) -> dict[str, Interval]:
    """Accuracies at a cost, of the series measured around it, over the samples that all of these answered."""
    found = {name: scores for name, curve in curves.items() if (scores := curve.scores_at(cost))}
    common = shared_samples(found.values())
    return {name: bootstrap_mean([scores[each] for each in common]) for name, scores in found.items() if common}


def _verdicts(records: list[ResultRecord]) -> str:
    """What is better and worse than each control at equal cost."""
    lines = []
    for axis, words in _AXES.items():
        for control in CONTROLS:
            said = [
                (record["label"], equal_cost_verdict(record, control, axis))
                for record in sorted(records, key=lambda r: (r["series"], -r["kept_tokens"]))
                if kind_of(record["method"]) == "method" and record.get("equal_cost", {}).get(axis, {}).get(control)
            ]
            groups = grouped(said)
            few = [each for _, each in said if each.kind == FEW]
            if few:
                most = max(few, key=lambda each: each.needed or 0)
                lines.append(f"- {control} at the same {words}: {most.sentence(control)}.")
                continue
            for kind in (BETTER, ALIKE, WORSE):
                if said:
                    names = ", ".join(_escaped(name) for name in groups[kind]) or "none"
                    sentence = Verdict(kind).sentence(control)
                    lines.append(f"- {sentence[0].upper()}{sentence[1:]} at the same {words}: {names}.")
    return "\n".join(lines) or "No control was measured around the cost of any point."


def _losses(records: list[ResultRecord]) -> str:
    """Which methods lose to random selection or to fewer pixels, and where."""
    lines = []
    for name in dict.fromkeys(r["series"] for r in records if kind_of(r["method"]) == "method"):
        where = []
        for control, axis in product(("random", "downsample"), _AXES):
            lost = [
                str(record["keep"])
                for record in records
                if record["series"] == name and equal_cost_verdict(record, control, axis).kind == WORSE
            ]
            if lost:
                where.append(f"to {control} at the same {_AXES[axis]} with keep = {', '.join(lost)}")
        if where:
            lines.append(f"- {_escaped(name)} loses {'; '.join(where)}.")
    methods = [record for record in records if kind_of(record["method"]) == "method"]
    shown = [
        equal_cost_verdict(r, control, axis) for r in methods for control in ("random", "downsample") for axis in _AXES
    ]
    if any(said.kind == FEW for said in shown):
        return "Not enough samples to say."
    if all(said.kind == UNKNOWN for said in shown):
        return "Neither random nor downsampling was measured around the cost of any method."
    return "\n".join(lines) or "Told apart by these samples, none loses to random or to downsampling at equal cost."


def _recommended(rows: list[dict[str, Any]]) -> str:
    """A table of the recommended methods; computed from the run, the one that chooses fastest first."""
    if not rows:
        return "No method was measured around these costs."
    lines = ["| tokens a layer | recommended | highest accuracy, % |", "|---:|---|---:|"]
    for row in rows:
        names = ", ".join(map(_escaped, row["recommended"])) if row["enough"] else "not enough samples"
        lines.append(
            f"| {number(row['cost'], '.4g')} | {names} | {100 * row['accuracy']:.1f} ({_escaped(row['best'])}) |"
        )
    return "\n".join(lines)


def _escaped(name: str) -> str:
    return name.replace("|", "\\|")


def _origin(merged: Merged) -> str:
    lines = []
    for run in merged.runs:
        origin, config = run.origin, run.origin["config"]
        hardware, versions = origin["hardware"], origin["versions"]
        where = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
        shared = f"torch {versions['torch']}, transformers {versions['transformers']}"
        lines.append(
            f"`{origin['command']}`: {config['dtype']}, seed {config['seed']}, {where}, {shared}, commit "
            f"{origin['commit'] or 'unknown'}, {origin['date'][:10]}."
        )
        if origin.get("limited", config["limit"] is not None):
            lines.append("A limit was set: these are not all samples of the task.")
    return "\n".join(lines)


def _unpruned(records: list[ResultRecord]) -> str:
    unpruned = next((record for record in records if kind_of(record["method"]) == "unpruned"), None)
    if unpruned is None:
        return ""
    costs = flat_costs(unpruned)
    cost = "" if costs["gflops_total"] is None else f", {costs['gflops_total']:.2f} GFLOPs to the first token"
    return (
        f"Unpruned: {_accuracy(unpruned['overall'])} percent of {unpruned['overall']['n']} questions, "
        f"{number(unpruned['visual_tokens'], '.4g')} visual tokens{cost}."
    )


def _table(records: list[ResultRecord]) -> str:
    lines = ["| " + " | ".join(HEADS) + " |", "|---|" + "---:|" * (len(HEADS) - 1)]
    for record in sorted(records, key=lambda r: (-r["kept_tokens"], -r["overall"]["accuracy"])):
        if kind_of(record["method"]) != "unpruned":
            lines.append("| " + " | ".join(_cells(record, records)) + " |")
    return "\n".join(lines)


def _cells(record: ResultRecord, records: list[ResultRecord]) -> list[str]:
    scores, costs = record["overall"], flat_costs(record)
    name, asked, area = _escaped(name_of(record)), off_budget(record, records), record.get("area", {}).get("tokens")
    return [
        f"*{name}*" if kind_of(record["method"]) == "control" else name,
        budget_of(record),
        number(record["kept_tokens"], ".4g") + (f" (not {asked})" if asked else ""),
        _accuracy(scores),
        _at_cost(record, "random", "tokens"),
        _at_cost(record, "random", "flops"),
        _at_cost(record, "uniform", "tokens"),
        _at_cost(record, "downsample", "flops"),
        _with_share(costs["gflops_total"], costs["flops_share"], ".2f"),
        _with_share(costs["kv_bytes"] and costs["kv_bytes"] / 1024, costs["kv_share"], ",.0f"),
        _show(costs["prefill_to_ideal"], 1, ".2f"),
        _show(costs["selection_to_unpruned_prefill"], 100, ".1f"),
        _show(costs["selection_ms"], 1, ".2f"),
        _at_cost(record, "uniform", "flops"),
        _at_cost(record, "downsample", "tokens"),
        "" if area is None else _interval(area["value"], area["low"], area["high"]),
    ]


def _at_cost(record: ResultRecord, control: str, axis: str) -> str:
    entry = record.get("equal_cost", {}).get(axis, {}).get(control)
    if entry is None:
        itself = is_control(record, control)
        return "" if itself else equal_cost_verdict(record, control, axis).sentence("control")
    text = f"{100 * entry['difference']:+.1f} ({100 * entry['low']:+.1f} to {100 * entry['high']:+.1f})"
    return f"**{text}**" if equal_cost_verdict(record, control, axis).told_apart else text


def _interval(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _accuracy(scores: Scores) -> str:
    return _interval(scores["accuracy"], scores["ci_low"], scores["ci_high"])


def _show(value: float | None, scale: float, form: str) -> str:
    return "" if value is None else format(scale * value, form)


def _with_share(value: float | None, share: float | None, form: str) -> str:
    return "" if value is None else format(value, form) + ("" if share is None else f" ({share:.0%})")
