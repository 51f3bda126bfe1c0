"""Published numbers as configs/papers has them, each with its source; none was run again here."""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml

from pages.docstring import escaped
from pages.places import ROOT

PAPERS = ROOT / "configs" / "papers"
MODELS = {
    "_llava_1_5_7b_targets.yaml": "LLaVA-1.5-7B",
    "_llava_next_7b_targets.yaml": "LLaVA-NeXT-7B",
    "_qwen2_5_vl_7b_targets.yaml": "Qwen2.5-VL-7B",
}


@cache
def targets() -> dict[str, list[dict[str, Any]]]:
    """Rows of tables by model."""
    return {
        model: yaml.safe_load((PAPERS / file).read_text(encoding="utf-8"))["targets"] for file, model in MODELS.items()
    }


@cache
def averages() -> list[dict[str, Any]]:
    """Averages over benchmarks, in percent of the unpruned model."""
    return yaml.safe_load((PAPERS / "_averages_2026.yaml").read_text(encoding="utf-8"))["averages"]


def table(rows: list[dict[str, Any]], first: str) -> str:
    """Rows as a table: one line for each budget and source, a column for each task; `first` names the first column's
    field, "method" or "keep"."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines: dict[tuple, dict[str, str]] = {}
    for row in rows:
        key = (row[first], row["keep"], str(row.get("options", "")), row["source"], row.get("evidence", ""))
        lines.setdefault(key, {})[row["task"]] = _value(row)
    heads = ["method"] * (first == "method") + ["budget"] + [task.removeprefix("lmms:") for task in tasks]
    heads += ["source", "what is unsure"]
    out = [f"| {' | '.join(map(escaped, heads))} |", "|" + "---|" * len(heads)]
    for (name, keep, _, source, evidence), cells in lines.items():
        start = [f"`{name}`"] if first == "method" else []
        row = [*start, str(keep), *(cells.get(task, "") for task in tasks), escaped(source), escaped(evidence)]
        out.append(f"| {' | '.join(row)} |")
    return _sourced(out)


def _sourced(lines: list[str]) -> str:
    """A table whose last two columns are sentences."""
    return "\n".join(['<div class="sourced" markdown>', "", *lines, "", "</div>"])


def _value(row: dict[str, Any]) -> str:
    return f"{row['value']:g}" + (f" of {row['unpruned']:g}" if "unpruned" in row else "")


def of_method(method: str) -> str:
    """All that is published of a method, as Markdown; "" where the settings have nothing."""
    parts = []
    for model, rows in targets().items():
        mine = [row for row in rows if row["method"] == method]
        if mine:
            parts.append(
                f"**{model}**, value of the unpruned model's (MME in points, else percent):\n\n{table(mine, 'keep')}"
            )
    mine = [row for row in averages() if row["method"] == method]
    if mine:
        parts.append(f"Averages over benchmarks, in percent of the unpruned model:\n\n{average_table(mine)}")
    return "\n\n".join(parts)


def average_table(rows: list[dict[str, Any]]) -> str:
    """Averages as a table; over other benchmarks, and made otherwise, from source to source."""
    lines = ["| model | budget | average, % | source | remark |", "|---|---|---|---|---|"]
    for row in rows:
        source = escaped(row["source"]) + (f", via {row['via']}" if "via" in row else "")
        lines.append(
            f"| {row['model']} | {row['keep']} | {row['value']:g} | {source} | {escaped(row.get('note', ''))} |"
        )
    return _sourced(lines)


def of_model(model: str) -> str:
    """The tables of one model, a line a method, budget and source."""
    rows = targets().get(model, [])
    return table(rows, "method") if rows else ""
