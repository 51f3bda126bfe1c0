"""What several seeds say together: the mean and the spread of a method that draws, over the seeds of a run."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from rich.table import Table

from tokenprune.evals.io.atomic_files import write_csv
from tokenprune.evals.results.records import ResultRecord, TableRow
from tokenprune.evals.results.summary import task_name
from tokenprune.interfaces.budget import budget_text


def over_seeds(records: list[ResultRecord]) -> list[TableRow]:
    """One row for each setting that was run with two seeds or more.

    Args:
        records: see `summary.summarise`.

    Returns:
        Rows with the setting, `seeds`, and over them the mean, the standard deviation (n - 1), the least and the
        greatest accuracy, all as fractions, and the mean of the paired differences to `random` of the same seed:
        `vs_random` at the budget that was asked for, `at_tokens_vs_random` at the same visual tokens, averaged over
        layers (both None for `random` itself, and where there is no such comparison).
    """
    groups: dict[str, list[ResultRecord]] = {}
    for record in records:
        if record["seed"] is not None:
            setting = [record[name] for name in ("model", "task", "method", "options", "keep")]
            groups.setdefault(json.dumps(setting, default=str), []).append(record)
    rows = []
    for group in groups.values():
        if len(group) < 2:
            continue
        first, accuracies = group[0], [record["overall"]["accuracy"] for record in group]
        beside = [record["overall"]["vs_random"] for record in group if record["overall"]["vs_random"] is not None]
        entries = [record.get("equal_cost", {}).get("tokens", {}).get("random") for record in group]
        at_tokens = [entry["difference"] for entry in entries if entry is not None]
        rows.append(
            {
                **{name: first[name] for name in ("model", "task", "method", "keep")},
                "shown": first.get("shown") or "",
                "options": ",".join(f"{key}={value}" for key, value in first["options"].items()),
                "seeds": " ".join(str(record["seed"]) for record in group),
                "n": first["overall"]["n"],
                "mean": statistics.mean(accuracies),
                "sd": statistics.stdev(accuracies),
                "least": min(accuracies),
                "greatest": max(accuracies),
                "vs_random": statistics.mean(beside) if beside else None,
                "at_tokens_vs_random": statistics.mean(at_tokens) if len(at_tokens) == len(group) else None,
            }
        )
    return rows


def write_seeds(folder: Path, records: list[ResultRecord]) -> list[Path]:
    """Write seeds.csv; where no setting has two seeds there is none, and that of an earlier run is taken away."""
    rows = over_seeds(records)
    path = folder / "seeds.csv"
    if not rows:
        path.unlink(missing_ok=True)
        return []
    return [write_csv(path, rows)]


def seed_tables(records: list[ResultRecord]) -> list[Table]:
    """The rows as one table for a terminal; none where no setting has two seeds."""
    rows = over_seeds(records)
    if not rows:
        return []
    note = "* at the same visual tokens, averaged over the decoder's layers, and with the same seed"
    compared = any(row["at_tokens_vs_random"] is not None for row in rows)
    table = Table(title="Over seeds, accuracy in percent", title_justify="left", caption=note if compared else None,
                  caption_justify="left", box=None, pad_edge=False)  # fmt: skip
    for name in ("model", "task", "method", "seeds", "mean", "sd", "least", "greatest", "vs random*"):
        table.add_column(name, justify="left" if name in ("model", "task", "method") else "right", no_wrap=True)
    names = {record["task"]: task_name(record) for record in records}
    for row in rows:
        method = row["shown"] or row["method"] + (f"({row['options']})" if row["options"] else "")
        numbers = [f"{100 * row[name]:.1f}" for name in ("mean", "sd", "least", "greatest")]
        at_tokens = row["at_tokens_vs_random"]
        beside = "" if at_tokens is None else f"{100 * at_tokens:+.1f}"
        label = method if row["keep"] is None else f"{method}@{budget_text(row['keep'])}"
        table.add_row(Path(row["model"]).name, names[row["task"]], label, row["seeds"], *numbers, beside)
    return [table]
