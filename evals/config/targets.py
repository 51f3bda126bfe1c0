"""Published numbers that a sweep can be compared with: one value of one method at one budget on one task each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenprune.evals.config.points import check_method_name
from tokenprune.registry import near

ACCURACY = "accuracy"
"""The metric that every task has: the mean score of its samples."""
UNITS = ("percent", "points")


@dataclass(frozen=True)
class Target:
    """A number that somebody published.

    Attributes:
        method, keep, task: the point that it is to be compared with, as a sweep file writes them.
        metric: "accuracy", or a metric that the task itself computes (of lmms-eval: "exact_match"); several are added.
        value: the number, in `unit`.
        source: where it stands.
        unit: "percent" (ours is a fraction), or "points" (ours as it is, like MME's score).
        unpruned: the unpruned model's number beside it in the same source, in the same unit.
        family: which numbers may be compared with each other: rows of one family share their baselines.
        options: of the method.
        model: where a run has several models.
        evidence: what is unsure about it ("unverified", "inferred"); empty means it was read as it stands.
        note: what a reader must know, for example another split.
    """

    method: str
    keep: int | float | str | None
    task: str
    value: float
    source: str
    metric: str | list[str] = ACCURACY
    unit: str = "percent"
    unpruned: float | None = None
    family: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    evidence: str = ""
    note: str = ""

    @property
    def metrics(self) -> list[str]:
        """`metric` as a list."""
        return [self.metric] if isinstance(self.metric, str) else list(self.metric)

    def fits(self, record: Mapping[str, Any]) -> bool:
        """Whether `record` (see `summary.summarise`) is the point that this is to be compared with."""
        place = (record["method"], record["keep"], record["task"], dict(record["options"]))
        return place == (self.method, self.keep, self.task, self.options) and self.model in (None, record["model"])


def read_target(number: int, entry: Any) -> Target:
    """An entry of `targets`.

    Args:
        number: its place in the list, for messages.

    Raises:
        ValueError: an unknown key (with near matches), a missing one, or a value of the wrong kind.
        UnknownName: no such method.
    """
    where = f"targets[{number}]"
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} must be a mapping, got {entry!r}.")
    fields = dataclasses.fields(Target)
    known = [item.name for item in fields]
    for key in entry:
        if key not in known:
            raise ValueError(f"{where} has an unknown key {key!r}.{near(str(key), known)} Known: {', '.join(known)}.")
    for item in fields:
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in entry:
            raise ValueError(f"{where} lacks the key {item.name!r}.")
    for key in ("value", "unpruned"):
        given = entry.get(key)
        missing = given is None and key == "unpruned"
        if not missing and (isinstance(given, bool) or not isinstance(given, (int, float))):
            raise ValueError(f"{key} of {where} must be a number, got {given!r}.")
    for key in ("task", "method", "source", "unit", "family", "evidence", "note", "model"):
        if key in entry and not isinstance(entry[key], str) and (entry[key] is not None or key != "model"):
            raise ValueError(f"{key} of {where} must be a text, got {entry[key]!r}.")
    target = Target(**entry)
    if target.unit not in UNITS:
        hint = near(str(target.unit), list(UNITS))
        raise ValueError(f"unit of {where} must be one of {', '.join(UNITS)}, got {target.unit!r}.{hint}")
    if not isinstance(target.options, Mapping) or not target.metrics:
        raise ValueError(f"{where} needs a mapping where it has options, and a metric, got {dict(entry)!r}.")
    check_method_name(target.method)
    return target
