"""The outcome of a search, in words and files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from tokenprune.evals.statistics.drop_bounds import Drop
from tokenprune.evals.tuning.recommend.search import Recommendation, Tried
from tokenprune.evals.tuning.recommend.settings import COSTS, RecommendConfig
from tokenprune.user_files import imported_files

YAML = "recommended.yaml"


def command(config: RecommendConfig) -> str:
    """The command line that asks for this."""
    parts = [f"tokenprune recommend --model {config.model} --data {config.data} --max-drop {config.max_drop:g}"]
    for name in ("cost", "limit", "seed", "trials", "minutes", "finalists", "dtype"):
        value, default = getattr(config, name), RecommendConfig.__dataclass_fields__[name].default
        parts += [f"--{name} {value}"] if value != default else []
    for name in ("methods", "budgets"):
        value = getattr(config, name)
        parts += [f"--{name} {','.join(map(str, value))}"] if value else []
    return " ".join([*parts, *(f"--import {file}" for file in imported_files())])


def sentences(config: RecommendConfig, result: Recommendation) -> list[str]:
    """The outcome of a search as sentences."""
    searched = f"{result.settings} settings were searched on {result.samples[0]} samples"
    lines = []
    chosen = result.chosen
    if chosen is None or chosen.held_out is None:
        near = result.closest
        drop = near.held_out or near.search
        lines.append(f"No setting is shown to drop accuracy by at most {config.max_drop:.2%}. {searched}.")
        lines.append(f"The closest is {near.setting.label}, {_cost(config, near)}: {_drop(drop)}.")
        if result.needed is None:
            lines.append("Its drop itself is not below --max-drop, so no number of samples would show that it is.")
        else:
            lines.append(
                f"If that drop and the rate of changed answers are the true ones, about {result.needed} samples (both "
                "halves) show it four times out of five."
            )
    else:
        lines.append(f"{chosen.setting.label} is the cheapest that holds, {_cost(config, chosen)}. {searched}.")
        lines.append(f"On the {chosen.held_out.n} held-out samples: {_drop(chosen.held_out)}.")
    lines.append(
        f"The bound is one-sided, at 95 percent: {_kind(result.closest.held_out)}. Unpruned, {result.accuracy:.2%} of "
        f"the held-out samples are right; with no answer lost they would show a drop of at most {result.at_best:.2%}."
    )
    return lines


def _cost(config: RecommendConfig, tried: Tried) -> str:
    return f"{tried.cost:.1%} of the unpruned model's {COSTS[config.cost]}"


def _drop(drop: Drop) -> str:
    gain = " (a gain)" if drop.value < 0 else ""
    return (
        f"a drop of {drop.value:+.2%}{gain}, at most {drop.bound:.2%} ({drop.lost} lost and {drop.won} won of {drop.n} "
        f"answers; bootstrap {drop.bootstrap:.2%}" + ("" if drop.exact is None else f", exact {drop.exact:.2%}") + ")"
    )


def _kind(drop: Drop | None) -> str:
    if drop is not None and drop.exact is None:
        return "the paired bootstrap over pictures, as there are many discordant pairs"
    shared = drop is not None and drop.pictures < drop.n
    return "the larger of the paired bootstrap over pictures and the exact unconditional score bound" + (
        f" (its samples divided by {drop.design_effect:.2f} for the questions that share a picture)"
        if drop is not None and shared
        else ""
    )


def table(config: RecommendConfig, result: Recommendation) -> Table:
    """What was tested on the held-out half, in order."""
    shown = Table(title=f"Tested on {result.samples[1]} held-out samples, from the safest to the cheapest")
    for name in ("setting", f"cost ({config.cost})", "drop, search", "drop, held out", "at most", "within the bound"):
        shown.add_column(name, justify="left" if name == "setting" else "right")
    for tried in result.tested:
        drop = tried.held_out
        if drop is not None:
            holds = "yes" if drop.bound <= config.max_drop else "no"
            numbers = (f"{tried.search.value:+.2%}", f"{drop.value:+.2%}", f"{drop.bound:.2%}", holds)
            shown.add_row(tried.setting.label, f"{tried.cost:.1%}", *numbers)
    return shown


def write(config: RecommendConfig, result: Recommendation) -> list[Path]:
    """Write what was found: the YAML that `apply` takes (first, and only where a setting keeps within the bound),
    everything as JSON, and the history of the search as CSV."""
    import yaml

    from tokenprune.evals.io.atomic_files import replace_file, write_csv

    folder = config.results
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    method = folder / YAML
    if result.chosen is None:
        method.unlink(missing_ok=True)
    else:
        point = result.chosen.setting
        comments = "".join(f"# {line}\n" for line in [command(config), *sentences(config, result)])
        entry = {"method": point.method, "keep": point.keep, **dict(point.options)}
        written.append(replace_file(method, comments + yaml.safe_dump(entry, sort_keys=False)))
    data: dict[str, Any] = {"command": command(config), "config": asdict(config), **asdict(result)}
    bounds = {tried.setting.label: tried.held_out.bound for tried in result.tested if tried.held_out is not None}
    data = {**data, "held_out_bounds": bounds, "date": _today()}
    written.append(replace_file(folder / "result.json", json.dumps(data, indent=1, default=str) + "\n"))
    short = [{**row, "cost": f"{row['cost']:.6g}", "drop": f"{row['drop']:.6g}"} for row in result.history]
    columns = ("setting", "cost", "samples", "drop", "finished")
    written.append(write_csv(folder / "search.csv", short, columns))
    return [*written, folder / "study.db"]


def _today() -> str:
    from datetime import datetime, timezone

    return datetime.now(timezone.utc).isoformat(timespec="seconds")
