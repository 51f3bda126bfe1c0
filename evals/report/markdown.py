"""The leaderboard as Markdown, for a repository or a paper's appendix; every sentence is computed from the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenprune.evals.io.atomic_files import replace_file
from tokenprune.evals.report.merge import Merged, merge
from tokenprune.evals.report.series import budget_of, budget_title, budgets, kind_of, name_of
from tokenprune.evals.results.records import ResultRecord, Scores
from tokenprune.evals.results.run_folder import FinishedRun
from tokenprune.evals.results.summary import flat_costs, title_of

HEADS = ("method", "tokens", "accuracy, %", "vs random, points", "headroom won, %", "GFLOPs", "KV, KiB",
         "prefill / ideal", "selection, %")  # fmt: skip
NO_BUDGET = "Without a budget of the run"
LEGEND = """\
*Tokens*: visual tokens that the decoder sees, averaged over its layers and the samples; a method that cuts inside the
decoder sees more than its last cut leaves. Accuracy with its 95 percent bootstrap interval. *vs random*: paired
difference to random selection at the same budget, with its interval. *Headroom won*: (method - random) / (oracle -
random); empty where the two are too near to divide by. *GFLOPs*: to the first token, vision tower and selection
included, and the share of the unpruned model's. *KV*: bytes of one prompt after prefill, and their share. *prefill /
ideal*: the ideal runs the tower on the same picture, then the decoder on just the kept tokens. *Selection*: of the time
of the unpruned prefill. Controls are in italics; the oracle knows what the answer depends on and is an upper bound."""


def write_markdown(path: Path, runs: Sequence[FinishedRun]) -> Path:
    """Write the leaderboard of one or more finished runs.

    Raises:
        ValueError: see `merge.merge`.
    """
    merged = merge(runs)
    parts = [f"# {merged.title}", _origin(merged), *merged.notes]
    for model, task in dict.fromkeys((r["model"], r["task"]) for r in merged.records):
        panel = [record for record in merged.records if (record["model"], record["task"]) == (model, task)]
        parts += [f"## {title_of(panel[0])}", _unpruned(panel)]
        for budget in budgets(panel):
            at = [record for record in panel if budget_of(record) == budget]
            parts += [f"### {budget_title(budget)}", _verdict(at), _table(at)]
        others = [record for record in panel if record["keep"] is None and kind_of(record["method"]) != "unpruned"]
        if others:
            parts += [f"### {NO_BUDGET}", _verdict(others), _table(others)]
    return replace_file(path, "\n\n".join(part for part in (*parts, LEGEND) if part) + "\n")


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
        f"{unpruned['visual_tokens']:.4g} visual tokens{cost}."
    )


def _verdict(records: list[ResultRecord]) -> str:
    """Which methods random selection loses to, which it cannot be told apart from, and which it beats."""
    groups: dict[str, list[str]] = {"Better than random": [], "Not told apart from random": [], "Worse than random": []}
    for record in sorted(records, key=lambda r: -r["overall"]["accuracy"]):
        low, high = record["overall"]["vs_random_low"], record["overall"]["vs_random_high"]
        if low is None or high is None or kind_of(record["method"]) in ("bound", "control"):
            continue
        names = list(groups)
        groups[names[0] if low > 0 else names[2] if high < 0 else names[1]].append(name_of(record))
    said = [f"- {title}: {', '.join(names) or 'none'}." for title, names in groups.items()]
    return "\n".join(said) if any(groups.values()) else ""


def _table(records: list[ResultRecord]) -> str:
    lines = ["| " + " | ".join(HEADS) + " |", "|---|" + "---:|" * (len(HEADS) - 1)]
    for record in sorted(records, key=lambda r: -r["overall"]["accuracy"]):
        lines.append("| " + " | ".join(_cells(record)) + " |")
    return "\n".join(lines)


def _cells(record: ResultRecord) -> list[str]:
    scores, costs = record["overall"], flat_costs(record)
    name = name_of(record).replace("|", "\\|")
    difference = ""
    value, low, high = scores["vs_random"], scores["vs_random_low"], scores["vs_random_high"]
    if value is not None and low is not None and high is not None:
        difference = f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return [
        f"*{name}*" if kind_of(record["method"]) == "control" else name,
        f"{record['kept_tokens']:.4g}",
        _accuracy(scores),
        difference,
        _show(scores["headroom_won"], 100, ".0f"),
        _with_share(costs["gflops_total"], costs["flops_share"], ".2f"),
        _with_share(costs["kv_bytes"] and costs["kv_bytes"] / 1024, costs["kv_share"], ",.0f"),
        _show(costs["prefill_to_ideal"], 1, ".2f"),
        _show(costs["selection_to_unpruned_prefill"], 100, ".1f"),
    ]


def _accuracy(scores: Scores) -> str:
    return f"{100 * scores['accuracy']:.1f} ({100 * scores['ci_low']:.1f} to {100 * scores['ci_high']:.1f})"


def _show(value: float | None, scale: float, form: str) -> str:
    return "" if value is None else format(scale * value, form)


def _with_share(value: float | None, share: float | None, form: str) -> str:
    return "" if value is None else format(value, form) + ("" if share is None else f" ({share:.0%})")
