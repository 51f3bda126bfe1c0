"""The five capabilities of every class that tests run, from the outcomes of their cells: `adapters/capabilities.yaml`,
which `tokenprune ls models` reads, and the table of docs/support.md.

`python tests/_capabilities.py docs/support.md` writes both for what the cells are to come to, which they then have to:
a class that is new to the zoo needs no run of all others."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from _families import BUILDERS
from _paths import ROOT
from _zoo import made
from _zoo_all import CELLS, FAMILIES, LACKS
from _zoo_timm import NAMES as TOWERS_OF_TIMM

from tokenprune.adapters.generic import MISSING
from tokenprune.interfaces.capability import CAPABILITIES
from tokenprune.registry import MODELS

FILE = ROOT / "adapters" / "capabilities.yaml"
_HEAD = (
    "# What tests prove of each class, written by `make test-all SUPPORT=docs/support.md`, for `tokenprune ls models`\n"
)
_IN_FAMILIES = {"layer_2": "fastv", "vision_0": "flowcut"}  # which cell of a family with a file shows the same

Outcomes = Mapping[tuple[str, str], str]


def expected() -> dict[tuple[str, str], str]:
    """What the cells come to: "passed" or "refused", by family and plan."""
    found = {cell: "refused" if cell in LACKS else "passed" for cell in CELLS}
    plans = {plan for _, plan in CELLS}
    return found | {(name, _IN_FAMILIES.get(plan, plan)): "passed" for name in BUILDERS for plan in plans}


def elsewhere() -> dict[tuple[str, str], str]:
    """What the cells come to whose classes cannot be made here, where timm is not installed: `make test-newest` and
    `make test-lowest` run them."""
    if find_spec("timm") is not None:
        return {}
    return {cell: outcome for cell, outcome in expected().items() if cell[0] in TOWERS_OF_TIMM}


def capabilities(outcomes: Outcomes) -> dict[str, dict[str, str]]:
    """By class, sorted, each of `CAPABILITIES`: "yes", "no", or what is left out."""
    rows: dict[str, dict[str, str]] = {}
    for name in (*BUILDERS, *FAMILIES):
        classes = [*MODELS.get(name).classes[:1]] if name in BUILDERS else [_class_of(name)]

        def has(*plans: str, name: str = name) -> list[bool]:
            keys = [(name, _IN_FAMILIES.get(plan, plan) if name in BUILDERS else plan) for plan in plans]
            return [outcomes.get(key) == "passed" for key in keys]

        read = has("fastv", "pyramiddrop")
        values = (
            "no" if not all(has("random", "divprune")) else "yes" if all(has("uniform")) else "yes, without a grid",
            "yes" if all(has("layer_2")) else "no",
            "yes" if all(read) else "some layers" if any(read) else "no",
            "yes" if all(has("vtc_cls")) else "no",
            "yes" if all(has("vision_0")) else "no",
        )
        for cls in classes:
            rows.setdefault(cls, dict(zip(CAPABILITIES, values)))  # the file of a family says more than any model
    return dict(sorted(rows.items()))


def _class_of(name: str) -> str:
    return made(name)[0].__name__


def as_yaml(rows: Mapping[str, Mapping[str, str]]) -> str:
    """The text of `FILE`."""
    return _HEAD + yaml.safe_dump({cls: dict(row) for cls, row in rows.items()}, sort_keys=False, width=120)


def as_table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Markdown: a row a class."""
    lines = [
        f"{len(rows)} classes, by the cells of tests/adapters/test_families.py and tests/adapters/test_any_model.py.",
        "Any other class, a subclass or remote code among them, is read off the loaded model and tried when a method",
        "is applied; what it lacks is refused by these names.",
        "",
        f"| class | {' | '.join(CAPABILITIES)} |",
        "|---|" + "---|" * len(CAPABILITIES),
        *(f"| `{cls}` | {' | '.join(row[name] for name in CAPABILITIES)} |" for cls, row in rows.items()),
    ]
    return "\n".join(lines)


def missing_table() -> str:
    """Markdown: a row a class that is missing."""
    lines = ["| class | why not |", "|---|---|", *(f"| `{name}` | {why} |" for name, why in sorted(MISSING.items()))]
    return "\n".join(lines)


def outcomes_of(found: Mapping[tuple[str, str], list[str]]) -> dict[tuple[str, str], Any]:
    """One outcome of the cells of each family and plan: "passed" if all did, "refused" if it is refused."""
    return {key: kinds[0] if len(set(kinds)) == 1 else "failed" for key, kinds in found.items()}


def written(text: str, rows: dict[str, dict[str, str]]) -> str:
    """A page with these rows in its tables; they are written into `FILE` as well."""
    from tokenprune.evals.report.readme import between

    FILE.write_text(as_yaml(rows), encoding="utf-8")
    return between(between(text, "classes", as_table(rows)), "missing", missing_table())


if __name__ == "__main__":
    PAGE = Path(sys.argv[1])
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), capabilities(expected())), encoding="utf-8")
