"""From what a user writes ("holov@64", a mapping, a YAML file, an object) to a method object and a budget."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenprune.base import Pruner
from tokenprune.budget import Budget, read_budget
from tokenprune.registry import METHODS, near

SITES = ("input", "pixels")


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


def parse_method(method: Any, keep: Any = None, **options: Any) -> tuple[Pruner, Budget]:
    """Read a method in any of the forms that `apply` takes.

    Args:
        method: a name ("holov"), a name with its budget ("holov@64", "holov@0.222"), a mapping with the key `method`
            (or `name`), optionally `keep` and the method's options, the path of a YAML file that holds such a mapping,
            or a `Pruner` object (it is copied).
        keep: the budget; wins over one in `method` only if `method` has none.
        options: options of the method.

    Raises:
        ValueError: no budget, or two budgets that differ, or options beside a method object.
    """
    budget: Any = None
    if isinstance(method, (str, Path)) and str(method).endswith((".yaml", ".yml")):
        method = _read_yaml(Path(method))
    if isinstance(method, Mapping):
        entry = dict(method)
        key = "method" if "method" in entry else "name"
        if key not in entry:
            raise ValueError(
                f"A method mapping needs the key 'method', got {sorted(map(str, entry))}.{_near_any(entry, 'method')}"
            )
        method, budget = entry.pop(key), entry.pop("keep", None)
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
    if isinstance(method, Pruner):
        if options:
            raise ValueError(f"Options {sorted(options)} were given beside a method object; set them on the object.")
        pruner = copy.copy(method)
    elif isinstance(method, str):
        pruner = make_method(method, **options)
    else:
        raise TypeError(
            f"method must be a name, a mapping, a YAML path or a Pruner object, got {type(method).__name__}."
        )
    if pruner.site not in SITES:
        raise ValueError(f"Method {pruner.name!r} acts at {pruner.site!r}; the sites here are {', '.join(SITES)}.")
    if budget is None:
        raise ValueError(f"Say how many visual tokens to keep: keep=128, keep=0.25 or {pruner.name or 'name'}@128.")
    return pruner, Budget(budget)


def _near_any(entry: Mapping[Any, Any], wanted: str) -> str:
    matches = [key for key in entry if near(str(key), [wanted])]
    return f" Did you write {matches[0]!r} for {wanted!r}?" if matches else ""


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} must hold a mapping with the key 'method', got {type(loaded).__name__}.")
    return loaded
