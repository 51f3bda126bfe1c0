"""From what a user writes ("holov@64", a mapping, a list of stages, a YAML file, an object) to stages."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenprune.base import Pruner
from tokenprune.budget import Budget, average_of, read_budget
from tokenprune.registry import METHODS, near
from tokenprune.stages import Depths, Stage, check_plan, check_site, solve_average, visual_lengths, with_positions


def make_method(name: str, **options: Any) -> Pruner:
    """A new method object by registered name.

    Raises:
        UnknownName: no such method.
        TypeError: an option that the method does not have; the message lists near matches and all of its options.
    """
    cls = METHODS.get(name)
    known = [field.name for field in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            raise TypeError(
                f"Method {name!r} has no option {option!r}.{near(option, known)} Its options: {', '.join(known)}."
            )
    return cls(**options)


@dataclass(frozen=True)
class Entry:
    """One entry of a method as a user wrote it.

    Attributes:
        pruner: the method object, a copy of its own.
        keep: the budget; None where an average over all layers was asked for instead.
        site: where it shall act; None for the method's own cuts.
    """

    pruner: Pruner
    keep: int | float | None
    site: str | None = None


@dataclass(frozen=True)
class Spec:
    """A method in any of the forms that `apply` takes, read and checked, before a model is known.

    Attributes:
        entries: one or more.
        average: visual tokens per image averaged over all decoder layers (int), or their fraction (float); the one
            entry without `keep` is solved for it. None: every entry has its own budget.
    """

    entries: tuple[Entry, ...]
    average: int | float | None = None

    @property
    def label(self) -> str:
        """`vtc_cls@64`, `todre@288 + random@64 at layer:9`."""
        parts = []
        for entry in self.entries:
            keep = f"avg{self.average}" if entry.keep is None else f"{entry.keep}"
            parts.append(f"{entry.pruner.name}@{keep}" + (f" at {entry.site}" if entry.site else ""))
        return " + ".join(parts)

    def plan(self, depths: Depths, num_tokens: int | None, positions: str | None = None) -> tuple[Stage, ...]:
        """Stages for a model.

        Args:
            depths: of the model.
            num_tokens: visual tokens of an image, where the family has one number.
            positions: the policy of methods that were not told one; None means each method's published one.

        Raises:
            ValueError: sites that the model does not have, or an average that cannot be held.
        """
        stages: list[Stage] = []
        for entry in self.entries:
            pruner = entry.pruner
            if pruner.positions is None:
                pruner = with_positions(pruner, positions or pruner.published_positions)
            keep = entry.keep if entry.keep is not None else self._solve(pruner, entry, depths, num_tokens)
            if entry.site is None:
                stages += pruner.stages(Budget(keep), depths)
            else:
                stages.append(Stage(entry.site, pruner, Budget(keep)))
        return check_plan(stages, depths)

    def _solve(self, pruner: Pruner, entry: Entry, depths: Depths, num_tokens: int | None) -> int | float:
        average = self.average
        if average is None:
            raise ValueError(f"Say how many visual tokens {pruner.name} shall keep.")
        nominal = 1000
        if isinstance(average, int):
            if num_tokens is None:
                raise ValueError(
                    f"average={average} is a number of tokens, and pictures of this family have no fixed number; give "
                    "the average as a fraction, like average=0.25."
                )
            nominal = num_tokens
        others: list[Stage] = []
        for other in self.entries:
            if other is not entry:
                budget = Budget(1 if other.keep is None else other.keep)
                own = other.pruner.stages(budget, depths)
                others += own if other.site is None else [Stage(other.site, other.pruner, budget)]

        def mean(keep: int) -> float:
            own = pruner.stages(Budget(keep), depths)
            stages = own if entry.site is None else (Stage(entry.site, pruner, Budget(keep)),)
            lengths = visual_lengths(check_plan([*others, *stages], depths), nominal, depths.decoder)
            return sum(lengths) / len(lengths)

        wanted = average if isinstance(average, int) else average * nominal
        keep = solve_average(pruner.name, mean, wanted, nominal)
        return keep if isinstance(average, int) else keep / nominal


def parse_method(method: Any, keep: Any = None, average: Any = None, **options: Any) -> Spec:
    """Read a method in any of the forms that `apply` takes.

    Args:
        method: a name ("holov"), a name with its budget ("holov@64", "holov@0.222", "fastv@avg128"), a mapping with the
            key `method` (or `prune`, or `name`), optionally `keep`, `at` and the method's options, a list of those
            (stages of one method), the path of a YAML file that holds such a mapping or list, or a `Pruner` object (it
            is copied).
        keep: the budget; a text like "avg64" is an average.
        average: in place of a budget, visual tokens averaged over all decoder layers (int) or their fraction.
        options: options of the method.

    Raises:
        ValueError: no budget, or two budgets that differ, or options beside a method object or a list.
    """
    if isinstance(method, (str, Path)) and str(method).endswith((".yaml", ".yml")):
        method = _read_yaml(Path(method))
    if isinstance(method, Mapping):
        method = dict(method)
        average = _one("averages", method.pop("average", None), average)
        if isinstance(method.get("method"), Sequence) and not isinstance(method["method"], str):
            rest = sorted(set(method) - {"method"})
            if rest:
                raise ValueError(f"Beside a list of stages a method has no other keys, got {rest}.")
            method = method["method"]
    if isinstance(method, Sequence) and not isinstance(method, str):
        if keep is not None or options:
            raise ValueError("A list of stages has keep and options in its entries, not beside it.")
        entries, averages = zip(*(_read_entry(item, None, {}) for item in method)) if method else ((), ())
        for found in averages:
            average = _one("averages", found, average)
    else:
        entry, found = _read_entry(method, keep, options)
        entries, average = (entry,), _one("averages", found, average)
    open_entries = [entry for entry in entries if entry.keep is None]
    name = entries[0].pruner.name or "name" if entries else "name"
    if not entries:
        raise ValueError("A list of stages needs at least one.")
    if average is None and open_entries:
        raise ValueError(f"Say how many visual tokens to keep: keep=128, keep=0.25 or {name}@128.")
    if average is not None:
        Budget(average)
        if len(open_entries) != 1:
            raise ValueError(
                f"An average over all layers is solved for the one stage that has no keep, and {len(open_entries)} "
                "have none."
            )
    return Spec(tuple(entries), average)


def _one(what: str, first: Any, second: Any) -> Any:
    if first is not None and second is not None and first != second:
        raise ValueError(f"Two {what} were given, {first} and {second}; give one.")
    return second if first is None else first


def _read_entry(method: Any, keep: Any, options: Mapping[str, Any]) -> tuple[Entry, Any]:
    """One entry and the average that it names (or None)."""
    site, budget = None, None
    if isinstance(method, Mapping):
        entry = dict(method)
        key = next((name for name in ("method", "prune", "name") if name in entry), None)
        if key is None:
            raise ValueError(
                f"A method mapping needs the key 'method', got {sorted(map(str, entry))}.{_near_any(entry, 'method')}"
            )
        method, budget, site = entry.pop(key), entry.pop("keep", None), entry.pop("at", None)
        options = {**entry, **options}
    if isinstance(method, str) and "@" in method:
        method, _, text = method.partition("@")
        if budget is not None and str(budget) != text:
            raise ValueError(f"Two budgets were given, @{text} and keep={budget}; give one.")
        budget = read_budget(text)
    if keep is not None:
        if budget is not None and budget != keep:
            raise ValueError(f"Two budgets were given, {budget} and keep={keep}; give one.")
        budget = keep
    average = average_of(budget)
    if average is not None:
        budget = None
    if isinstance(method, Pruner):
        if options:
            raise ValueError(f"Options {sorted(options)} were given beside a method object; set them on the object.")
        pruner = copy.copy(method)
    elif isinstance(method, str):
        pruner = make_method(method, **options)
    else:
        raise TypeError(
            f"method must be a name, a mapping, a list of them, a YAML path or a Pruner object, got "
            f"{type(method).__name__}."
        )
    if budget is not None:
        budget = Budget(budget).keep
    check_site(pruner.site if site is None else site, numbered=site is not None)
    return Entry(pruner, budget, site), average


def _near_any(entry: Mapping[Any, Any], wanted: str) -> str:
    matches = [key for key in entry if near(str(key), [wanted])]
    return f" Did you write {matches[0]!r} for {wanted!r}?" if matches else ""


def _read_yaml(path: Path) -> Any:
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(loaded, (Mapping, list)):
        raise ValueError(f"{path} must hold a mapping with the key 'method', got {type(loaded).__name__}.")
    return loaded
