"""Points of a grid: model x task x method x budget, and how entries of `methods` become points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenprune.budget import read_budget
from tokenprune.notation import pruner_parts, split_name, split_outside
from tokenprune.registry import INTERVENTIONS, METHODS, UnknownName, near

NONE = "none"
"""The method name of the unpruned model."""


@dataclass(frozen=True)
class Point:
    """One model x task x method x budget.

    Attributes:
        method: a name, or several parts as written on one line ("vtc_cls+var"), the budget taken out.
        keep: visual tokens kept of each image (int), or the kept fraction (float), or their mean over the decoder's
            layers ("avg64"); None for the unpruned model, and where nothing prunes or all parts have their own budget.
        options: the method's options that were set, as a sorted tuple of pairs.
        reference: run only so that others can be compared with it.
    """

    model: str
    task: str
    method: str
    keep: int | float | str | None
    options: tuple[tuple[str, Any], ...] = ()
    reference: bool = False

    @property
    def label(self) -> str:
        """`holov@64`, `holov(variant=official)@64`, `none`."""
        return self.series if self.keep is None else f"{self.series}@{self.keep}"

    @property
    def series(self) -> str:
        """The label without its budget: what a line in a plot is called."""
        options = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{self.method}({options})" if options else self.method

    @property
    def key(self) -> str:
        """Unique within a run folder."""
        return f"{self.model}|{self.task}|{self.label}"


def check_method_name(method: str) -> None:
    """Raise UnknownName if a part of `method` is neither registered nor `none`; imports nothing heavy."""
    parts = split_outside(method, "+")
    known = [*METHODS.names(), *INTERVENTIONS.names()] + [NONE] * (len(parts) == 1)
    for part in parts:
        name = split_name(part)[0]
        if name not in known:
            raise UnknownName(
                f"There is no method called {name!r}.{near(name, known)} Known: {', '.join(sorted(known))}."
            )


def needs_budget(method: str) -> bool:
    """Whether `method`, as written, prunes and does not say itself how many tokens it keeps."""
    return method != NONE and any(split_name(part)[2] is None for part in pruner_parts(method))


def method_of_file(path: str) -> Mapping[str, Any]:
    """The mapping with the key 'method' in a YAML file, as `tokenprune tune` writes it.

    Raises:
        FileNotFoundError, ValueError: no such file, or it holds none.
    """
    import yaml

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no method file {path}.")
    loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(loaded, Mapping) or not isinstance(loaded.get("method"), str):
        raise ValueError(f"{path} must hold a mapping whose key 'method' names one method.")
    return loaded


def read_entry(entry: Any, budgets: list[Any]) -> tuple[str, tuple[tuple[str, Any], ...], list[Any]]:
    """Name, options and budgets of an entry; the budgets are [None] where nothing is left to be said."""
    if isinstance(entry, str) and entry.endswith((".yaml", ".yml")):
        entry = method_of_file(entry)
    if isinstance(entry, str):
        entry = {"method": entry}
    if not isinstance(entry, Mapping) or "method" not in entry:
        raise ValueError(f"An entry of methods is a name or a mapping with the key 'method', got {entry!r}.")
    rest = dict(entry)
    name, own = str(rest.pop("method")), rest.pop("keep", None)
    pruners = pruner_parts(name)
    if len(pruners) == 1 and pruners[0] == name:
        name, written, budget = split_name(name)
        rest = {**written, **rest}
        own = _one_budget(name, own, budget)
    elif len(pruners) == 1:  # the one budget beside interventions is the point's
        head, at, budget = pruners[0].rpartition("@")
        if at:
            own = _one_budget(head, own, budget)
            name = "+".join(head if part == pruners[0] else part for part in split_outside(name, "+"))
    elif own is None:
        own = [None]
    own = budgets if own is None else own
    return name, tuple(sorted(rest.items())), own if isinstance(own, list) else [own]


def _one_budget(name: str, own: Any, written: str | None) -> Any:
    if own is not None and written is not None:
        raise ValueError(f"Two budgets were given for {name!r}, @{written} and keep: {own}; give one.")
    return own if written is None else read_budget(written)
