"""From what a user writes ("holov@64", a mapping, a list of stages, a YAML file, an object) to stages and
interventions."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenprune.interfaces.budget import AVERAGE, Budget, average_of, budget_text, read_budget
from tokenprune.interfaces.cache_policy import CachePolicy
from tokenprune.interfaces.intervention import Intervention
from tokenprune.interfaces.pruner import ModelDepths, Pruner, Stage
from tokenprune.plan.checks import check_plan, check_site, solve_average, visual_lengths, with_positions
from tokenprune.plan.expression import read_yaml, split_name, split_outside
from tokenprune.plan.options import check_kind
from tokenprune.registry import CACHE_POLICIES, INTERVENTIONS, METHODS, beside_methods, near


def make_method(name: str, **options: Any) -> Pruner:
    """A new method object by registered name.

    Raises:
        UnknownName: no such method.
        TypeError: an option that the method does not have; the message lists near matches and all of its options.
    """
    return _make("Method", METHODS.get(name), name, options)


def make_intervention(name: str, **options: Any) -> Intervention:
    """A new intervention or cache policy by registered name; raises as `make_method` does."""
    kind, registry = (
        ("Cache policy", CACHE_POLICIES) if name in CACHE_POLICIES.names() else ("Intervention", INTERVENTIONS)
    )
    return _make(kind, registry.get(name), name, options)


def _make(kind: str, cls: Any, name: str, options: Mapping[str, Any]) -> Any:
    known = [field.name for field in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            raise TypeError(
                f"{kind} {name!r} has no option {option!r}.{near(option, known)} Its options: {', '.join(known)}."
            )
    for field in dataclasses.fields(cls):
        if field.name in options:
            check_kind(name, field, options[field.name])
    return cls(**options)


@dataclass(frozen=True)
class Entry:
    """One entry of a method as a user wrote it.

    Attributes:
        pruner: the method object, copied for this entry.
        keep: the budget; None where an average over all layers was asked for instead.
        site: where it shall act; None for the cuts that the method plans.
    """

    pruner: Pruner
    keep: int | float | None
    site: str | None = None


@dataclass(frozen=True)
class Spec:
    """A method in any of the forms that `apply` takes, read and checked, before a model is known.

    Attributes:
        entries: what prunes; none where there are interventions only.
        average: visual tokens per image averaged over all decoder layers (int), or their fraction (float); the one
            entry without `keep` is solved for it. None: every entry has its own budget.
        interventions: what changes attention; copied for this spec.
    """

    entries: tuple[Entry, ...]
    average: int | float | None = None
    interventions: tuple[Intervention, ...] = ()

    @property
    def label(self) -> str:
        """`vtc_cls@64`, `todre@288 + random@64 at layer:9`, `vtc_cls@64 + var(p=0.4)`."""
        parts = []
        for entry in self.entries:
            keep = budget_text(f"{AVERAGE}{self.average}" if entry.keep is None else entry.keep)
            parts.append(f"{entry.pruner.name}@{keep}" + (f" at {entry.site}" if entry.site else ""))
        return " + ".join([*parts, *map(_intervention_label, self.interventions)])

    def plan(self, depths: ModelDepths, num_tokens: int | None, positions: str | None = None) -> tuple[Stage, ...]:
        """Stages for a model.

        Args:
            depths: of the model.
            num_tokens: visual tokens of an image, where the family has one number.
            positions: the policy of methods that were not told one; None means each method's published one.

        Raises:
            ValueError: sites that the model does not have, or an average that cannot be reached.
        """
        if not self.entries:
            return ()
        stages: list[Stage] = []
        for entry in self.entries:
            pruner = entry.pruner
            if pruner.positions is None:
                pruner = with_positions(pruner, positions or pruner.own_positions)
            keep = entry.keep if entry.keep is not None else self._solve(pruner, entry, depths, num_tokens)
            stages += _stages(pruner, entry.site, keep, depths)
        return check_plan(stages, depths)

    def _solve(self, pruner: Pruner, entry: Entry, depths: ModelDepths, num_tokens: int | None) -> int | float:
        average = self.average
        if average is None:
            raise ValueError(f"Say how many visual tokens {pruner.name} shall keep.")
        counted = [other.keep for other in self.entries if isinstance(other.keep, int)]
        if isinstance(average, float) and num_tokens is None and counted:
            raise ValueError(
                f"average={average} is a fraction and keep={counted[0]} a number of tokens, and pictures of this "
                "family have no fixed number; give both as fractions."
            )
        if isinstance(average, int) and num_tokens is None:
            raise ValueError(
                f"average={average} is a number of tokens, and pictures of this family have no fixed number; give "
                "the average as a fraction, like average=0.25."
            )
        # counts of tokens are solved for a picture of N; fractions on a finer scale
        nominal = num_tokens if num_tokens is not None and (counted or isinstance(average, int)) else 1000
        others: list[Stage] = []
        for other in self.entries:
            if other is not entry:
                others += _stages(other.pruner, other.site, 1 if other.keep is None else other.keep, depths)

        def mean(keep: int) -> float:
            stages = _stages(pruner, entry.site, keep, depths)
            lengths = visual_lengths(check_plan([*others, *stages], depths), nominal, depths.decoder)
            return sum(lengths) / len(lengths)

        wanted = average if isinstance(average, int) else average * nominal
        keep = solve_average(pruner.name, mean, wanted, nominal, as_share=isinstance(average, float))
        return keep if isinstance(average, int) else keep / nominal


def _stages(pruner: Pruner, site: str | None, keep: int | float, depths: ModelDepths) -> tuple[Stage, ...]:
    """The cuts of one entry: those that the method plans, or one cut where the user wants it."""
    budget = Budget(keep)
    return pruner.stages(budget, depths) if site is None else (pruner.stage_at(site, budget),)


def _intervention_label(intervention: Intervention) -> str:
    fields = [field for field in dataclasses.fields(intervention) if getattr(intervention, field.name) != field.default]
    options = ",".join(f"{field.name}={getattr(intervention, field.name)}" for field in fields)
    return f"{intervention.name}({options})" if options else intervention.name


def parse_method(method: Any, keep: Any = None, average: Any = None, **options: Any) -> Spec:
    """Read a method in any of the forms that `apply` takes.

    Args:
        method: a name ("holov", "var"), a name with options and budget ("holov@64", "holov(variant=official)@0.222",
            "fastv@avg128", "var(p=0.4)"), several of these joined by plus signs ("vtc_cls@64+var"), a mapping with the
            key `method` (or `prune`, or `name`), optionally `keep`, `at` and the method's options, a list of all of
            those (stages of one method, and interventions), the path of a YAML file with such a mapping or list,
            a `Pruner` or `Intervention` object (it is copied), or what this function returned.
        keep: the budget; a text like "avg64" is an average. With a list it is that of the one stage.
        average: in place of a budget, visual tokens averaged over all decoder layers (int) or their fraction.
        options: options of the method.

    Raises:
        ValueError: no budget, or two budgets that differ, or options together with a method object or a list.
    """
    if isinstance(method, Spec):
        if keep is not None or average is not None or options:
            raise ValueError("A method that was read already takes no keep, average or options beside it.")
        return dataclasses.replace(method, interventions=tuple(map(copy.copy, method.interventions)))
    if isinstance(method, (str, Path)) and str(method).endswith((".yaml", ".yml")):
        method = _read_yaml(Path(method))
    if isinstance(method, Mapping):
        method = dict(method)
        average = _one("averages", method.pop("average", None), average)
        if isinstance(method.get("method"), Sequence) and not isinstance(method["method"], str):
            other_keys = sorted(map(str, set(method) - {"method"}))
            if other_keys:
                raise ValueError(f"Beside a list of stages a method has no other keys, got {other_keys}.")
            method = method["method"]
    if isinstance(method, str) and len(split_outside(method, "+")) > 1:
        method = split_outside(method, "+")
    if isinstance(method, Sequence) and not isinstance(method, str):
        items = [_read_entry(item, None, {}) for item in method]
        stages = [number for number, (item, _) in enumerate(items) if isinstance(item, Entry)]
        if options or (keep is not None and (len(stages) != 1 or len(items) == 1)):
            raise ValueError("A list of stages has keep and options in its entries, not beside it.")
        if keep is not None:
            items[stages[0]] = _read_entry(method[stages[0]], keep, {})
    else:
        items = [_read_entry(method, keep, options)]
    for _, item_average in items:
        average = _one("averages", item_average, average)
    entries = tuple(item for item, _ in items if isinstance(item, Entry))
    interventions = tuple(item for item, _ in items if isinstance(item, Intervention))
    if not items:
        raise ValueError("A list of stages needs at least one.")
    open_entries = [entry for entry in entries if entry.keep is None]
    if average is None and open_entries:
        name = open_entries[0].pruner.name or "name"
        if len(entries) > 1:
            raise ValueError(f"Each of several stages needs a budget of its own; {name} has none: {name}@128.")
        raise ValueError(f"Say how many visual tokens to keep: keep=128, keep=0.25 or {name}@128.")
    if average is not None:
        Budget(average)
        if len(open_entries) != 1:
            raise ValueError(
                f"An average over all layers is solved for the one stage that has no keep, and {len(open_entries)} "
                "have none."
            )
    return Spec(entries, average, interventions)


def _one(what: str, first: Any, second: Any) -> Any:
    if first is not None and second is not None and first != second:
        raise ValueError(f"Two {what} were given, {first} and {second}; give one.")
    return second if first is None else first


def _read_entry(method: Any, keep: Any, options: Mapping[str, Any]) -> tuple[Entry | Intervention, Any]:
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
        unnamed = next((key for key in entry if not isinstance(key, str)), None)
        if unnamed is not None or None in entry:
            raise TypeError(f"An option of {method!r} must have a name that is a text, got {unnamed!r}.")
        options = {**entry, **options}
    if isinstance(method, str):
        method, written, text = split_name(method)
        for option in written:
            if option in options:
                raise ValueError(f"Option {option!r} of {method!r} was given twice.")
        options = {**written, **options}
        if text is not None:
            if budget is not None and str(budget) != text:
                raise ValueError(f"Two budgets were given, @{text} and keep={budget}; give one.")
            budget = read_budget(text)
    if keep is not None:
        if budget is not None and budget != keep:
            raise ValueError(f"Two budgets were given, {budget} and keep={keep}; give one.")
        budget = keep
    if isinstance(method, Intervention) or (isinstance(method, str) and method in beside_methods()):
        return _read_intervention(method, budget, site, options), None
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
            f"method must be a name, a mapping, a list of them, a YAML path, a Pruner or an Intervention object, got "
            f"{type(method).__name__}."
        )
    if budget is not None:
        budget = Budget(budget).keep
    check_site(pruner.site if site is None else site, numbered=site is not None)
    if site is not None:
        _check_beside_site(pruner, site)
    return Entry(pruner, budget, site), average


def _check_beside_site(pruner: Pruner, site: str) -> None:
    for field in dataclasses.fields(pruner):
        if field.name in pruner.plan_options and getattr(pruner, field.name) != field.default:
            raise ValueError(
                f"{field.name}={getattr(pruner, field.name)} of {pruner.name} says where it cuts by itself, and has no "
                f"meaning beside at={site!r}; give one of the two."
            )


def _read_intervention(method: Any, budget: Any, site: Any, options: Mapping[str, Any]) -> Intervention:
    name = method if isinstance(method, str) else method.name
    if budget is not None:
        does = (
            "thins the KV cache"
            if isinstance(method, CachePolicy) or name in CACHE_POLICIES.names()
            else "changes attention"
        )
        raise ValueError(f"{name} {does} and keeps every token, so it takes no budget, got {budget}.")
    if site is not None:
        raise ValueError(f"{name} acts in decoder layers; say which with layers=[...], not with at={site!r}.")
    if isinstance(method, str):
        return make_intervention(method, **options)
    if options:
        raise ValueError(f"Options {sorted(options)} were given beside an intervention object; set them on the object.")
    return copy.copy(method)


def _near_any(entry: Mapping[Any, Any], wanted: str) -> str:
    matches = [key for key in entry if near(str(key), [wanted])]
    return f" Did you write {matches[0]!r} for {wanted!r}?" if matches else ""


def _read_yaml(path: Path) -> Any:
    if not os.path.isfile(path):  # and not Path.is_file, which raises for names that no file can have
        raise FileNotFoundError(f"There is no file {path}.")
    loaded = read_yaml(path)
    if not isinstance(loaded, (Mapping, list)):
        raise ValueError(f"{path} must hold a mapping with the key 'method', got {type(loaded).__name__}.")
    return loaded
