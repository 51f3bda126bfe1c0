"""report.html: one page that opens from disk, with the leaderboard, plots, samples and agreement of one or more runs.

Tables are written here as HTML; plots, bars, samples and matrices are drawn by the scripts beside this file from one
JSON object in the page. No library and no network: scripts, styles and pictures are all inside.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import cast

from tokenprune.evals.report.about import about
from tokenprune.evals.report.agreement import agreement
from tokenprune.evals.report.details import family_table, flops_table
from tokenprune.evals.report.explorer import Drawn, Room, explorer
from tokenprune.evals.report.findings import findings
from tokenprune.evals.report.html import filled, write_framed
from tokenprune.evals.report.leaderboard import GROUPS, leaderboard
from tokenprune.evals.report.merge import Merged, merge
from tokenprune.evals.report.series import budget_of, budget_title, budgets, name_of, series_styles
from tokenprune.evals.results.equal_cost import equal_cost_verdict
from tokenprune.evals.results.records import ResultRecord
from tokenprune.evals.results.run_folder import FinishedRun
from tokenprune.evals.results.summary import flat_costs, title_of

HERE = Path(__file__).parent
SCRIPTS = (
    "common.js", "table.js", "about.js", "plot.js", "families.js", "agreement.js", "explorer.js", "state.js", "main.js",
)  # fmt: skip
LINKS = {name: name for name in ("plot", "board", "families", "samples", "agreement")} | {"board": "leaderboard"}
BAR = """  <div class="tabs" role="group" aria-label="model and task"></div>
  <div class="budget"><span class="soft">budget</span>
    <div class="switch budgets" role="group" aria-label="budget"></div></div>"""


def write_report(path: Path, runs: Sequence[FinishedRun]) -> Path:
    """Write the page of one or more finished runs.

    Raises:
        ValueError: see `merge.merge`.
    """
    merged = merge(runs)
    room = Room()
    panels, data = [], []
    for number, (model, task) in enumerate(dict.fromkeys((r["model"], r["task"]) for r in merged.records)):
        panel = [record for record in merged.records if (record["model"], record["task"]) == (model, task)]
        panels.append(_panel(number, panel, merged))
        data.append(_data(panel, merged, room))
    # "</" would end the script element
    drawn = json.dumps({"panels": data}, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    parts = {
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "lead": _lead(merged),
        "bar": BAR,
        "main": "\n".join(panels),
        "origin": _origin(merged),
        "data": f'<script type="application/json" id="data">{drawn}</script>',
        "script": "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    return write_framed(path, merged.title, merged.notes, LINKS, parts)


def _lead(merged: Merged) -> str:
    origin, config = merged.runs[0].origin, merged.runs[0].origin["config"]
    hardware = origin["hardware"]
    counts = sorted({record["overall"]["n"] for record in merged.records})
    facts = [
        f"{', '.join(map(str, counts))} samples a point",
        "greedy answers",
        config["dtype"],
        f"seed {config['seed']}",
        hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads",
        origin["date"][:10],
    ]
    short = any(run.origin.get("limited", run.origin["config"]["limit"] is not None) for run in merged.runs)
    limit = ' <b class="warn">A limit was set: these are not all samples of the task.</b>' if short else ""
    return " · ".join(escape(str(fact)) for fact in facts) + limit


def _panel(number: int, records: list[ResultRecord], merged: Merged) -> str:
    groups = "".join(
        f'<button type="button" data-group="{group}" aria-pressed="{str(place == 0).lower()}">{title}</button>'
        for place, (group, title) in enumerate(GROUPS)
    )
    flops = flops_table(records)
    more = f"<details><summary>FLOPs by part of the model</summary>{flops}</details>" if flops else ""
    parts = {
        "number": str(number),
        "name": escape(title_of(records[0])),
        "findings": findings(records, merged.rows),
        "groups": groups,
        "leaderboard": leaderboard(records),
        "tests": str(sum("random" in record.get("equal_cost", {}).get("tokens", {}) for record in records)),
        "tests_unpruned": str(sum(record["overall"]["vs_unpruned_p"] is not None for record in records)),
        "families": family_table(records),
        "more": more,
    }
    return filled("panel.html", parts)


def _data(records: list[ResultRecord], merged: Merged, room: Room) -> Drawn:
    asked = [run.origin["config"].get("overlays") or {} for run in merged.runs]
    keeps = budgets(records)
    first = next((str(each["keep"]) for each in asked if str(each.get("keep")) in keeps), keeps[-1] if keeps else "")
    return {
        "name": title_of(records[0]),
        "budgets": [{"keep": keep, "title": budget_title(keep)} for keep in keeps],
        "first": first,
        "series": series_styles(records),
        "points": [_point(record) for record in records],
        "about": {record["label"]: about(record) for record in records},
        "agreement": agreement(records, merged.rows),
        "explorer": explorer(records, merged.rows, merged.runs, room),
    }


def _point(record: ResultRecord) -> Drawn:
    scores, costs = record["overall"], flat_costs(record)
    fair = cast("dict[str, float]", record.get("equal_cost", {}).get("tokens", {}).get("random") or {})
    parts = (costs["gflops_prefill"], costs["gflops_selection"])
    decoder = None if None in parts else sum(parts)
    point = {
        "label": record["label"], "series": name_of(record), "budget": budget_of(record), "n": scores["n"],
        "accuracy": scores["accuracy"], "low": scores["ci_low"], "high": scores["ci_high"],
        "vs_random": fair.get("difference"), "vs_random_low": fair.get("low"), "vs_random_high": fair.get("high"),
        "holm": fair.get("holm"), "verdict": equal_cost_verdict(record, "random").sentence("it"),
        "tokens": record["kept_tokens"], "flops": costs["gflops_total"], "decoder": decoder,
        "flops_share": costs["flops_share"], "kv": None if costs["kv_bytes"] is None else costs["kv_bytes"] / 1024,
        "kv_share": costs["kv_share"], "prefill": costs["prefill_ms"],
        "families": {
            name: [each["accuracy"], each["ci_low"], each["ci_high"], each["n"]]
            for name, each in record["families"].items()
        },
    }  # fmt: skip
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in point.items()}


def _origin(merged: Merged) -> str:
    parts = []
    for run in merged.runs:
        text = json.dumps(run.origin, indent=2, ensure_ascii=False, default=str)
        parts.append(
            f"<p><code>{escape(str(run.origin['command']))}</code></p>"
            f"<details><summary>settings, versions, hardware of {escape(run.name)}</summary><pre>{escape(text)}</pre>"
            "</details>"
        )
    return "".join(parts)
