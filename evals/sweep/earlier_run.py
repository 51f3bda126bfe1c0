"""What a run folder holds of an earlier run, and what becomes of it: nothing finished is replaced without a word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.io.rows import SampleRow
from tokenprune.evals.results.over_tasks import ALL_TASKS
from tokenprune.evals.results.run_folder import read_records

DECIDING = ("limit", "seed", "dtype", "max_new_tokens")
"""Settings that make other results of the same points."""


def check_earlier(config: RunConfig) -> None:
    """Let a run into the folder of a finished one only where it goes on with it.

    The same points, more of them or more samples go on. So does a sweep of the same name that names fewer points: they
    are said to be left out (`left_out`).

    Raises:
        ValueError: finished results of other settings would be replaced.
    """
    file = config.folder / "results.jsonl"
    if not file.is_file():
        return
    records = read_records(file)
    before = (records[0].get("provenance") or {}).get("config") or {}
    changed = [
        _change(name, before.get(name), getattr(config, name)) for name in DECIDING if _other(config, before, name)
    ]
    points = {record["point"]: record["label"] for record in records if record["task"] != ALL_TASKS}
    gone = sorted({label for key, label in points.items() if key not in {point.key for point in config.points()}})
    if gone and before.get("name") != config.name:
        changed.append(f"it is the run {before.get('name')!r}, whose {', '.join(gone)} this run has not")
    if changed:
        raise ValueError(
            f"{config.folder} holds the finished results of other settings: {'; '.join(changed)}. Name another folder "
            "with --output, or replace these results with --force; answers stay in samples.jsonl either way."
        )


def _other(config: RunConfig, before: Mapping[str, Any], name: str) -> bool:
    then, now = before.get(name), getattr(config, name)
    if name == "limit":  # more samples hold those that are there
        return now is not None and (then is None or now < then)
    return name in before and then != now


def _change(name: str, then: Any, now: Any) -> str:
    usual = "all samples" if name == "limit" else "the default"
    return f"{name} {usual if then is None else then} there, {usual if now is None else now} now"


def left_out(config: RunConfig, rows: Iterable[SampleRow]) -> list[str]:
    """A sentence on points that the folder has answers of and that the run does not name; [] where there are none."""
    named = {point.key for point in config.points()}
    others: dict[str, list[str]] = {}
    for key in dict.fromkeys(row["point"] for row in rows):
        if key not in named:
            _, task, written = key.split("|", 2)
            others.setdefault(re.sub(r"(\d\.\d{4})\d{3,}", r"\1...", written), []).append(task)
    if not others:
        return []
    return [
        f"{config.folder / 'samples.jsonl'} also has answers of {', '.join(others)}, which this run does not name, so "
        "they are left out of its tables; name them again to see them beside the others."
    ]
