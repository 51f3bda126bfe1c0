"""From the settings of a run to its points, each once and always in the same order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenprune.evals.config.points import NONE, MethodEntry, Point, compile_method, read_entry
from tokenprune.registry import near

POINT_KEYS = ("model", "task", "method", "keep", "options", "as")
"""What an entry of `points` may hold."""


@dataclasses.dataclass(frozen=True)
class Listed:
    """An entry of `points`, read.

    Attributes:
        models, tasks: where it runs.
        entry: its method.
    """

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    entry: MethodEntry


def read_point(number: int, entry: Any, models: Sequence[str], tasks: Sequence[str]) -> Listed:
    """An entry of `points`: a mapping with `method`, and optionally `model`, `task`, `keep`, `options` and `as`.

    Args:
        number: its place in the list, for messages.
        models, tasks: of the file; an entry without `model` or `task` runs on all of them.

    Raises:
        ValueError: an unknown key (with near matches), or one that is missing.
    """
    where = f"points[{number}]"
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} must be a mapping with the keys {', '.join(POINT_KEYS)}, got {entry!r}.")
    for key in entry:
        if key not in POINT_KEYS:
            known = ", ".join(POINT_KEYS)
            raise ValueError(
                f"{where} has an unknown key {key!r}.{near(str(key), list(POINT_KEYS))} Known: {known}; options of the "
                "method stand under 'options'."
            )
    options = entry.get("options") or {}
    if "method" not in entry or not isinstance(options, Mapping):
        raise ValueError(f"{where} needs a method, and a mapping where it has options, got {entry!r}.")
    for key in ("method", "keep", "grid", "as"):
        if key in options:
            raise ValueError(f"{where} has {key!r} under options; a point is one setting, and {key} stands beside it.")
    found = {
        key: (str(entry[key]),) if key in entry else tuple(given) for key, given in (("model", models), ("task", tasks))
    }
    for key, names in found.items():
        if not names:
            raise ValueError(f"{where} names no {key}, and the file has none either.")
    method = {"method": entry["method"], **{key: entry[key] for key in ("keep", "as") if key in entry}, **options}
    (read,) = read_entry(method, [])
    return Listed(found["model"], found["task"], read)


def expand(
    models: Sequence[str],
    tasks: Sequence[str],
    entries: Sequence[MethodEntry],
    listed: Sequence[Listed],
    seeds: Sequence[int],
    references: bool,
) -> list[Point]:
    """All points: by model, then task; there the unpruned model, `random`, the methods as they are listed, each at its
    budgets, each with its seeds. What is asked for twice is run once.

    Args:
        entries: run on every model and task.
        listed: run where they say.
        seeds: of methods that draw; empty leaves one point each, with the run's seed.
        references: whether to add the unpruned model, and `random` at every budget.

    Raises:
        ValueError: two settings that differ have the same label.
    """
    cells = [(model, task) for model in models for task in tasks] if entries else []
    cells += [(model, task) for one in listed for model in one.models for task in one.tasks]
    points: list[Point] = []
    for model, task in _together(cells):
        own = list(entries) if model in models and task in tasks else []
        own += [one.entry for one in listed if model in one.models and task in one.tasks]
        points += _cell(model, task, own, seeds, references)
    return points


def _together(cells: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each cell once, those of a model together: a model is loaded once."""
    return [
        cell for model in dict.fromkeys(cell[0] for cell in cells) for cell in dict.fromkeys(cells) if cell[0] == model
    ]


def _cell(model: str, task: str, entries: Sequence[MethodEntry], seeds: Sequence[int], references: bool) -> list[Point]:
    asked: dict[str, Point] = {}
    for entry in entries:
        keeps = (None,) if entry.method == NONE else entry.keeps
        own: Sequence[int | None] = seeds if seeds and draws(entry) else [None]
        for keep in keeps:
            for seed in own:
                point = Point(model, task, entry.method, keep, entry.options, seed=seed, shown=entry.shown)
                if asked.setdefault(point.key, point) != point:
                    raise ValueError(f"Two settings that differ are both written {point.written!r}; give one of them.")
    _check_labels(asked.values())
    points: dict[str, Point] = {}
    if references and any(point.method != NONE for point in asked.values()):
        budgets = dict.fromkeys(point.keep for point in asked.values() if point.keep is not None)
        found = [Point(model, task, NONE, None, reference=True)]
        found += [Point(model, task, "random", keep, (), True, seed) for keep in budgets for seed in seeds or [None]]
        points = {point.key: point for point in found}
    # an asked point takes the place of its reference, so the order stays: what is compared with comes first
    points.update(asked)
    return list(points.values())


def _check_labels(points: Iterable[Point]) -> None:
    """Raise ValueError where two points would look the same to a reader."""
    seen: dict[str, Point] = {}
    for point in points:
        other = seen.setdefault(point.label, point)
        if other.key != point.key:
            raise ValueError(
                f"Two settings that differ would both be called {point.label!r} in tables and plots: {other.written} "
                f"and {point.written}. Rename one of the files, or give one a name with as: NAME."
            )


def draws(entry: MethodEntry) -> bool:
    """Whether another seed makes another choice: a part draws, and was not given a seed of its own."""
    if entry.method == NONE:
        return False
    # a budget of its own has only a method of several parts
    keep = entry.keeps[0] if entry.keeps else 1
    spec = compile_method(entry.method, keep, entry.options)
    if "seed" in dict(entry.options):
        return False
    return any(one.pruner.is_random and getattr(one.pruner, "seed", 0) == 0 for one in spec.entries)


def matching_reference(point: Point, points: Sequence[Point], method: str = "random") -> Point | None:
    """The point of `method`, without options, that a point is compared with: at the same budget and seed; for a method
    that draws nothing, with the first of the seeds. None where there is none, and for that point itself."""
    place = (point.model, point.task, method, point.keep, ())
    if (point.model, point.task, point.method, point.keep, point.options) == place:
        return None
    found = [one for one in points if (one.model, one.task, one.method, one.keep, one.options) == place]
    return next((one for one in found if one.seed == point.seed), found[0] if found else None)
