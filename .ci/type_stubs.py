"""Write what type checkers know of methods: `.venv/bin/python .ci/type_stubs.py`, after a method or an option changed.

`tokenprune/calls.pyi` has one overload of `apply` and of `applied` for each method, intervention and cache policy, with
its options, so that a misspelt name or option is an error before anything runs; the `__init__.pyi` name the classes.
tests/core/test_types.py fails where the files are not those of today.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

from tokenprune.registry import CACHE_POLICIES, INTERVENTIONS, METHODS, Registry

PACKAGE = Path(__file__).resolve().parents[1] / "tokenprune"
HEAD = '"""{}\n\nWritten by .ci/type_stubs.py, not by hand.\n"""\n\n'
KNOWN = {"int", "float", "bool", "str", "None", "list", "Sequence", "Any"}
SHARED = {
    "positions": 'Literal["compact", "keep"] | None',
    "scope": 'Literal["raster", "visual"] | None',
}
CALL = 'outputs: _Outputs = "auto", verify: bool = True'
KEEP = "keep: _Keep = None, average: _Average = None"
NO_BUDGET = "keep: None = None, average: None = None"
ALIASES = (
    '_Outputs: TypeAlias = Literal["auto", "kept", "full"]\n_Keep: TypeAlias = int | float | str | None\n'
    "_Average: TypeAlias = int | float | None\n"
    "_Theirs: TypeAlias = (\n    MethodName | Path | Mapping[str, Any] | list[Any] | tuple[Any, ...]\n"
    "    | Pruner | Intervention | CachePolicy\n)\n\n"
)


def built_in(registry: Registry) -> list[str]:
    """Names of ours."""
    return [name for name in registry.names() if registry.file_of(name)]


def type_of(cls: Any, field: Any) -> str:
    """What an option takes, as a stub writes it."""
    if field.name in SHARED:
        return SHARED[field.name]
    variants = getattr(sys.modules[cls.__module__], "VARIANTS", None)
    if field.name == "variant" and variants:
        return f"Literal[{', '.join(repr(str(one)) for one in variants)}]".replace("'", '"')
    text = re.sub(r"tuple\[(\w+), \.\.\.\]( \| list\[\w+\])?", r"Sequence[\1]", str(field.type))
    return text if set(re.findall(r"\w+", text)) <= KNOWN else "Any"


def overloads(call: str, result: str) -> list[str]:
    """One for each name of ours, then those for methods that only the user knows, then text that holds everything."""
    lines = []
    for registry, keep in ((METHODS, KEEP), (INTERVENTIONS, NO_BUDGET), (CACHE_POLICIES, NO_BUDGET)):
        for name in built_in(registry):
            cls: Any = registry.get(name)
            fields = [f"{field.name}: {type_of(cls, field)} = ..." for field in dataclasses.fields(cls)]
            options = ", ".join(["*", *fields]) if fields else ""
            given = ", ".join(filter(None, ["model: Any", f'method: Literal["{name}"]', keep, CALL, options]))
            lines.append(f"@overload\ndef {call}({given}) -> {result}: ...\n")
    theirs = "MethodName | Path | Mapping[str, Any] | list[Any] | tuple[Any, ...] | Pruner | Intervention"
    theirs += " | CachePolicy"
    lines.append(
        f"@overload\ndef {call}(model: Any, method: {theirs}, {KEEP}, {CALL}, **options: Any) -> {result}: ...\n"
    )
    lines.append(f"@overload\ndef {call}(model: Any, method: str, *, {CALL}) -> {result}: ...\n")
    return lines


def calls_stub() -> str:
    """`calls.pyi`."""
    head = HEAD.format("`apply` and `applied` by the names and options of methods, for type checkers.")
    imports = (
        "from collections.abc import Mapping, Sequence\nfrom contextlib import AbstractContextManager\n"
        "from pathlib import Path\nfrom typing import Any, Literal, TypeAlias, overload\n\n"
        "from tokenprune.handle import Handle\nfrom tokenprune.interfaces.cache_policy import CachePolicy\n"
        "from tokenprune.interfaces.intervention import Intervention\n"
        "from tokenprune.interfaces.pruner import Pruner\nfrom tokenprune.registry import MethodName\n\n"
    )
    body = overloads("apply", "Handle") + overloads("applied", "AbstractContextManager[Handle]")
    return head + imports + ALIASES + "".join(body)


def classes_stub(registry: Registry, what: str) -> str:
    """`__init__.pyi` of a package of ours."""
    lines = [
        f"from {registry.package}.{name} import {registry.class_name(name)} as {registry.class_name(name)}\n"
        for name in built_in(registry)
    ]
    return HEAD.format(f"The classes of {what}, for type checkers.") + "".join(lines)


def stubs() -> dict[Path, str]:
    """Every generated file with its text."""
    return {
        PACKAGE / "calls.pyi": calls_stub(),
        PACKAGE / "methods" / "__init__.pyi": classes_stub(METHODS, "methods"),
        PACKAGE / "interventions" / "__init__.pyi": classes_stub(INTERVENTIONS, "interventions"),
        PACKAGE / "cache_policies" / "__init__.pyi": classes_stub(CACHE_POLICIES, "cache policies"),
    }


if __name__ == "__main__":
    for file, text in stubs().items():
        file.write_text(text, encoding="utf-8")
        print(file)
