"""What runs that are put side by side differ in, besides their points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from tokenprune.evals.results.run_folder import FinishedRun


def unlike(runs: Sequence[FinishedRun]) -> list[str]:
    """A sentence on settings, versions, commits and machines that are not the same in all runs; [] where all are."""
    made = [_made_of(run) for run in runs]
    differing = []
    for name in made[0] if made else ():
        if any(each[name] != made[0][name] for each in made):
            said = dict.fromkeys(f"{each[name]} in {run.name}" for each, run in zip(made, runs, strict=True))
            differing.append(f"{name} ({', '.join(said)})")
    if not differing:
        return []
    return [
        f"These runs differ in {'; '.join(differing)}. A difference between points of two of them may come from that; "
        "times of two machines do not compare."
    ]


def _made_of(run: FinishedRun) -> dict[str, Any]:
    origin = cast(Mapping[str, Any], run.origin)
    config, versions, hardware = origin["config"], origin["versions"], origin["hardware"]
    return {
        "dtype": config["dtype"],
        "max_new_tokens": config.get("max_new_tokens") or "the task's",
        "engine": config.get("engine") or "transformers",
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "commit": origin.get("commit") or "unknown",
        "machine": hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads",
    }
