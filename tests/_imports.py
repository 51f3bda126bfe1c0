"""Which module of the package imports which, read from the sources; functions and type-checking blocks count too."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from _paths import ROOT

FOLDERS = ("tokenprune", "adapters", "kernels", "evals")


def module_of(file: Path) -> str:
    """`tokenprune/plan/parse.py` -> `plan.parse`; the package itself is ""."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "tokenprune" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, Path]:
    """Every module by its name below `tokenprune`."""
    return {module_of(file): file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))}


@cache
def imports() -> dict[str, dict[str, set[str]]]:
    """By module, the modules of the package that it imports, and the names that it takes of each."""
    found: dict[str, dict[str, set[str]]] = {}
    for module, file in sources().items():
        arrows: dict[str, set[str]] = {}
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                taken = [(f"{node.module}.{name.name}", name.name) for name in node.names]
            elif isinstance(node, ast.Import):
                taken = [(name.name, "") for name in node.names]
            else:
                continue
            for whole, name in taken:
                if not f"{whole}.".startswith("tokenprune."):
                    continue
                target = whole.removeprefix("tokenprune").lstrip(".")
                while target and target not in sources():
                    target = target.rpartition(".")[0]
                if target != module:
                    arrows.setdefault(target, set()).add(name)
        found[module] = arrows
    return found
