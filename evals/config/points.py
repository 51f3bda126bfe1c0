"""One model x task x method x budget, and what a user writes for a method in a sweep file."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.interfaces.budget import budget_text, read_budget
from tokenprune.plan.expression import pruner_parts, read_yaml, split_name, split_outside
from tokenprune.registry import METHODS, UnknownName, beside_methods, near

if TYPE_CHECKING:
    from tokenprune.plan.parse import Spec

NONE = "none"
"""The method name of the unpruned model."""

ENTRY_KEYS = ("method", "keep", "grid", "as")
"""What an entry of `methods` may hold beside the method's options."""


@dataclass(frozen=True)
class Point:
    """One model x task x method x budget.

    Attributes:
        method: a name, or several parts as written on one line ("vtc_cls+var"), the budget taken out.
        keep: visual tokens kept of each image (int), or the kept fraction (float), or their mean over the decoder's
            layers ("avg64"); None for the unpruned model, and where nothing prunes or all parts have their own budget.
        options: the method's options that were set, as a sorted tuple of pairs.
        reference: run only so that others can be compared with it.
        seed: of a method that draws, where a run has several seeds; None leaves it to the run.
        shown: what tables, plots and pages call method and options: the stem of the file that they came from, or what
            `as` says; None: what they are. Says nothing about what runs.
    """

    model: str
    task: str
    method: str
    keep: int | float | str | None
    options: tuple[tuple[str, Any], ...] = ()
    reference: bool = False
    seed: int | None = None
    shown: str | None = field(default=None, compare=False)

    @property
    def label(self) -> str:
        """What a reader knows it by: `holov@64`, `holov(variant=official)@64`, `vflowopt-25@0.1983` (a tuned file),
        `random@64 seed 1`, `none`."""
        return self._seeded(self._shown if self.keep is None else f"{self._shown}@{budget_text(self.keep)}")

    @property
    def series(self) -> str:
        """The label without its budget: what a line in a plot is called."""
        return self._seeded(self._shown)

    @property
    def _shown(self) -> str:
        return self.shown or _configured(self.method, ((key, _short(value)) for key, value in self.options))

    @property
    def written(self) -> str:
        """The label with every option and every digit: what a setting is, whatever it is called."""
        configured = _configured(self.method, self.options)
        return self._seeded(configured if self.keep is None else f"{configured}@{self.keep}")

    def _seeded(self, text: str) -> str:
        return text if self.seed is None else f"{text} seed {self.seed}"

    def compile(self) -> Spec:
        """Its method, see `compile_method`."""
        return compile_method(self.method, self.keep, self.options)

    @property
    def key(self) -> str:
        """Unique within a run folder."""
        return f"{self.model}|{self.task}|{self.written}"


def spoken(label: str) -> str:
    """A point's label for a line that people read: what `--method none` asks is the unpruned model."""
    return "unpruned" if label == NONE else label


def _configured(method: str, options: Iterable[tuple[str, Any]]) -> str:
    inner = ",".join(f"{key}={value}" for key, value in options)
    return f"{method}({inner})" if inner else method


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) and len(repr(value)) > 8 else value


@dataclass(frozen=True)
class MethodEntry:
    """One setting of a method.

    Attributes:
        method, options: see `Point`.
        keeps: its budgets; (None,) where nothing is left to be said, () where one is missing.
        shown: see `Point`.
    """

    method: str
    options: tuple[tuple[str, Any], ...]
    keeps: tuple[Any, ...]
    shown: str | None = None

    def check_keys(self) -> None:
        """Raise ValueError for an option that is a misspelt key of an entry; other wrong options are the method's to
        refuse. Imports the method."""
        if self.method not in METHODS.names():
            return
        known = [item.name for item in dataclasses.fields(METHODS.get(self.method))]
        for option, _ in self.options:
            if option not in known and near(option, list(ENTRY_KEYS)) and not near(option, known):
                raise ValueError(
                    f"The entry of {self.method!r} has an unknown key {option!r}.{near(option, list(ENTRY_KEYS))}"
                )


def check_method_name(method: str) -> None:
    """Raise UnknownName if a part of `method` is neither registered nor `none`; imports nothing heavy."""
    parts = split_outside(method, "+")
    known = [*METHODS.names(), *beside_methods()] + [NONE] * (len(parts) == 1)
    for part in parts:
        name = split_name(part)[0]
        if name not in known:
            raise UnknownName(
                f"There is no method called {name!r}.{near(name, known)} Known: {', '.join(sorted(known))}."
            )


_compiled: dict[Any, Spec] = {}


def compile_method(method: str, keep: Any, options: tuple[tuple[str, Any], ...]) -> Spec:
    """The method of a point, as `apply` takes it: read once, however often a run asks.

    Args:
        method, keep, options: see `Point`.

    Raises:
        TypeError, ValueError, UnknownName: see `parse_method`.
    """
    from tokenprune.plan.parse import parse_method

    names = [split_name(part)[0] for part in split_outside(method, "+")]
    # a class that a user registers anew makes another method of the same name
    classes = tuple(METHODS.get(name) for name in names if name in METHODS.names())
    key = (method, repr(keep), repr(options), classes)
    if key not in _compiled:
        _compiled[key] = parse_method(method, keep, **dict(options))
    return _compiled[key]


def needs_budget(method: str) -> bool:
    """Whether `method`, as written, prunes and does not say itself how many tokens it keeps."""
    return method != NONE and any(split_name(part)[2] is None for part in pruner_parts(method))


def method_of_file(path: str) -> Mapping[str, Any]:
    """The mapping with the key 'method' in a YAML file, as `tokenprune tune` writes it.

    Raises:
        FileNotFoundError, ValueError: no such file, it is no YAML, or it holds none.
    """
    file = Path(path)
    if not os.path.isfile(file):
        raise FileNotFoundError(f"There is no method file {path}.")
    loaded = read_yaml(file)
    if not isinstance(loaded, Mapping) or not isinstance(loaded.get("method"), str):
        raise ValueError(f"{path} must hold a mapping whose key 'method' names one method.")
    return loaded


def named_by_file(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, and the file's stem for a name (`as`) where the mapping has options: those that a
    search found are no name that anybody could read. A file that is called like a method keeps its suffix."""
    entry = dict(method_of_file(path))
    if set(entry) - set(ENTRY_KEYS) and "grid" not in entry:
        file = Path(path)
        taken = file.stem in METHODS.names() or file.stem == NONE
        entry.setdefault("as", file.name if taken else file.stem)
    return entry


def _checked_name(shown: Any, method: str, grid: Any) -> str | None:
    if shown is None:
        return None
    if not isinstance(shown, str) or not shown.strip() or "@" in shown or "|" in shown:
        raise ValueError(f"as is what tables call {method!r}: a text without @ and |, got {shown!r}.")
    if grid:
        raise ValueError(f"as: {shown} names one setting of {method!r}, and its grid has several; leave one out.")
    if shown in (*METHODS.names(), NONE) and shown != method:
        raise ValueError(f"as: {shown} is the name of another method; call this setting of {method!r} something else.")
    return shown


def read_entry(entry: Any, budgets: list[Any]) -> list[MethodEntry]:
    """What an entry of `methods` stands for: one setting of a method, or with `grid` the product of several.

    Args:
        entry: a name, the path of a method file, or a mapping with `method`, optionally `keep`, `grid` (by option, a
            list of values) and `as` (what tables and plots call it), and the method's options.
        budgets: those of an entry that names none.

    Raises:
        ValueError: it is none of these, or a grid that is no mapping of options to lists.
    """
    if isinstance(entry, str) and entry.endswith((".yaml", ".yml")):
        entry = named_by_file(entry)
    if isinstance(entry, str):
        entry = {"method": entry}
    if not isinstance(entry, Mapping) or "method" not in entry:
        keys = [key for key in entry if near(str(key), ["method"])] if isinstance(entry, Mapping) else []
        hint = f" Did you write {keys[0]!r} for 'method'?" if keys else ""
        raise ValueError(f"An entry of methods is a name or a mapping with the key 'method', got {entry!r}.{hint}")
    rest = dict(entry)
    for key in rest:
        if not isinstance(key, str):
            raise ValueError(f"The keys of an entry of methods are texts, got {key!r} in {entry!r}.")
    name, own, grid = str(rest.pop("method")), rest.pop("keep", None), rest.pop("grid", {})
    shown = _checked_name(rest.pop("as", None), name, grid)
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
    keeps = tuple(own) if isinstance(own, list) else (own,)
    found = []
    for chosen in _product(name, grid, rest):
        found.append(MethodEntry(name, tuple(sorted({**rest, **chosen}.items())), keeps, shown))
    return found


def _product(name: str, grid: Any, fixed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every choice of one value for each option of a grid, the last option varying fastest."""
    if not isinstance(grid, Mapping):
        raise ValueError(f"The grid of {name!r} maps options to lists of values, got {grid!r}.")
    for option, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"grid gives {option!r} of {name!r} a list of values, got {values!r}.")
        if option in fixed:
            raise ValueError(f"{name!r} has the option {option!r} in its grid and beside it; give it once.")
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def _one_budget(name: str, own: Any, written: str | None) -> Any:
    if own is not None and written is not None:
        raise ValueError(f"Two budgets were given for {name!r}, @{written} and keep: {own}; give one.")
    return own if written is None else read_budget(written)
