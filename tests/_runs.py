"""Runs on the tiny model, and what of them must be equal whatever happened on the way."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from rich.console import Console

from tokenprune.evals.config.measure import Measure, Overlays
from tokenprune.evals.config.run_config import RunConfig

QUIET = Console(quiet=True)
UNTIMED = Measure(samples=1, times=False, flops=False)


def config(folder: Path, model: str, task: str, **changes) -> RunConfig:
    settings = {"methods": ["none", "vtc_cls"], "keep": [9], "limit": 10, "batch_size": 4, "measure": UNTIMED}
    settings = {**settings, "overlays": Overlays(samples=0), **changes}
    return RunConfig("test", model, [task], output=str(folder), **settings)


def rows_of(folder: Path) -> list[dict]:
    """All rows of answers, of all writers."""
    return [json.loads(line) for file in sorted(folder.glob("samples*.jsonl")) for line in file.open()]


def answers_of(folder: Path) -> dict[tuple[str, str], dict]:
    """The rows by point and sample; fails if one is there twice."""
    rows = rows_of(folder)
    found = {(row["point"], row["sample_id"]): row for row in rows}
    assert len(found) == len(rows), "a sample was counted twice"
    return found


def table_of(folder: Path) -> list[dict]:
    """summary.csv without its times."""
    with (folder / "summary.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return [{k: v for k, v in row.items() if "_ms" not in k and "prefill" not in k} for row in rows]
