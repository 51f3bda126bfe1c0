"""What `tokenprune ls methods` knows of each method; its table is read from the sources and imports nothing."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenprune.registry import METHODS

FACTS = ("site", "text_aware", "published_positions", "adaptive", "merges", "published", "reproduces")
HEADS = ("method", "site", "text-aware", "positions", "budget", "merges", "what it does")


def facts(name: str) -> dict[str, Any]:
    """Class attributes of a method by name: `FACTS`, and `adaptive` is "by options" where its options decide, or only
    one of its cuts does. Those of an installed package that was not imported are None."""
    file = METHODS.file_of(name)
    if file is not None:
        return _read(file, name)
    cls = METHODS.registered(name)
    if cls is None:
        return dict.fromkeys(FACTS)
    found = {fact: getattr(cls, fact) for fact in FACTS}
    return found | ({"adaptive": "by options"} if _decides(cls) else {})


def _decides(cls: Any) -> bool:
    from tokenprune.interfaces.pruner import Pruner

    return cls.is_adaptive is not Pruner.is_adaptive


def _read(file: Path, name: str) -> dict[str, Any]:
    tree = _tree(file)
    node = next((node for node in _classes(tree) if name in _registered_as(node)), None)
    found: dict[str, Any] = dict.fromkeys(FACTS)
    for each in _lineage(tree, node):
        for statement in each.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
                fact = statement.target.id
                if fact in FACTS and found[fact] is None:
                    found[fact] = _literal(statement.value)
            base = each.name == "Pruner"
            if isinstance(statement, ast.FunctionDef) and statement.name == "is_adaptive" and not base:
                found["adaptive"] = "by options"
    cuts = [_attribute(each, "adaptive") for each in _classes(tree) if each is not node]
    return found | ({"adaptive": "by options"} if found["adaptive"] is False and True in cuts else {})


def _attribute(node: ast.ClassDef, name: str) -> Any:
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and getattr(statement.target, "id", None) == name and statement.value:
            return _literal(statement.value)
    return None


def _classes(tree: ast.Module) -> list[ast.ClassDef]:
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]


def _registered_as(node: ast.ClassDef) -> list[Any]:
    calls = [call for call in node.decorator_list if isinstance(call, ast.Call)]
    return [arg.value for call in calls for arg in call.args if isinstance(arg, ast.Constant)]


def _lineage(tree: ast.Module, node: ast.ClassDef | None) -> Iterator[ast.ClassDef]:
    """A class and its bases, as far as they are files of this package."""
    if node is None:
        return
    yield node
    for base in node.bases:
        if not isinstance(base, ast.Name):
            continue
        here = next((each for each in _classes(tree) if each.name == base.id), None)
        if here is not None:
            yield from _lineage(tree, here)
            continue
        for line in tree.body:
            if isinstance(line, ast.ImportFrom) and line.module and base.id in [alias.name for alias in line.names]:
                file = _source(line.module)
                if file is not None:
                    there = _tree(file)
                    yield from _lineage(there, next((each for each in _classes(there) if each.name == base.id), None))


def _source(module: str) -> Path | None:
    if not module.startswith("tokenprune."):
        return None
    spec = find_spec(module)
    return Path(spec.origin) if spec and spec.origin else None


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _literal(value: ast.expr) -> Any:
    try:
        return ast.literal_eval(value)
    except ValueError:
        return None


def method_rows() -> list[dict[str, Any]]:
    """One entry a method: name, `FACTS`, and what it does in a line."""
    return [{"name": name, **facts(name), "does": METHODS.describe(name)} for name in METHODS.names()]


def budget_words(adaptive: Any) -> str:
    """How a method keeps to its budget."""
    return {None: "", False: "exact", True: "adaptive"}.get(adaptive, str(adaptive))


def method_lines() -> list[str]:
    """The table, a line a method."""
    rows: list[tuple[str, ...]] = [HEADS]
    for row in method_rows():
        yes = {True: "yes", False: "no", None: ""}
        rows.append(
            (row["name"], row["site"] or "", yes[row["text_aware"]], row["published_positions"] or "",
             budget_words(row["adaptive"]), yes[row["merges"]], row["does"])
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def method_details(name: str) -> dict[str, Any]:
    """Everything of one method, as JSON can hold it.

    Raises:
        UnknownName: no such method; the message has the near matches.
    """
    cls = METHODS.get(name)
    module = sys.modules[cls.__module__]
    doc = inspect.cleandoc(module.__doc__ or cls.__doc__ or "")
    options = []
    said = {key: text for base in reversed(cls.__mro__) for key, text in described(base.__doc__ or "").items()}
    for field in dataclasses.fields(cls):
        default = None if field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        options.append({"name": field.name, "default": default, "means": said.get(field.name, "")})
    variants = [str(one) for one in getattr(module, "VARIANTS", ())]
    return {
        "name": name, "does": doc.partition("\n")[0], **facts(name), "signals": read_signals(cls), "options": options,
        "variants": variants,
        "notes": doc.partition("\n")[2].strip(),
    }  # fmt: skip


def read_signals(cls: Any) -> list[str]:
    """Signals that the sources of a method name: which of them it asks for depends on its options, cut and tower."""
    from tokenprune.interfaces import signals

    known = {
        name: value
        for name, value in vars(signals).items()
        if name.isupper() and isinstance(value, str) and value != signals.OWN_LAYERS
    }
    modules = [
        sys.modules[base.__module__] for base in cls.__mro__ if base.__module__.startswith(METHODS.package + ".")
    ]
    modules += [] if modules else [sys.modules[cls.__module__]]
    named: list[str] = []
    for name, value in [pair for module in modules for pair in vars(module).items()]:
        helps = inspect.isfunction(value) and value.__module__ == signals.__name__  # of the tower
        named += value.__code__.co_names if helps else [name]
    named = [name for name in named if name in known]
    return [known[name] for name in dict.fromkeys(named)]


def described(doc: str) -> dict[str, str]:
    """The entries of the section `Attributes:` of a docstring, by name; an entry `mean, std: ...` is of both."""
    section = inspect.cleandoc(doc).partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        entry = re.match(r"    ([a-z_0-9]+(?:, [a-z_0-9]+)*): (.*)", line)
        if line and not line.startswith("    "):
            break
        if entry:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2].strip())
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def detail_lines(details: dict[str, Any]) -> list[str]:
    """The same for a reader."""
    yes = {True: "yes", False: "no"}
    lines = [
        f"{details['name']}: {details['does']}",
        "",
        f"source       {details['published'] or 'none was given'}",
        f"reproduces   {details['reproduces'] or 'no published number is known'}",
        f"site         {details['site']}",
        f"text-aware   {yes[details['text_aware']]}",
        f"positions    {details['published_positions']}",
        f"budget       {budget_words(details['adaptive'])}",
        f"merges       {yes[details['merges']]}",
        f"signals      {', '.join(details['signals']) or 'none: what the embeddings say'}",
    ]
    if details["variants"]:
        lines.append(f"variants     {', '.join(details['variants'])}")
    lines += ["", "options, with their defaults:"]
    for option in details["options"]:
        lines.append(f"  {option['name']} = {option['default']!r}")
        lines += [f"      {option['means']}"] * bool(option["means"])
    return [*lines, "", details["notes"]]
