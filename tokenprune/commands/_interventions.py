"""What `tokenprune ls interventions` knows of each change of attention and each cache policy."""

from __future__ import annotations

import dataclasses
import inspect
import sys

from tokenprune.commands._methods import described
from tokenprune.registry import INTERVENTIONS, beside_methods

HEADS = ("intervention", "rows", "text alone", "source", "what it does")


def intervention_lines() -> list[str]:
    """The table, a line an intervention."""
    rows: list[tuple[str, ...]] = [HEADS]
    for name, registry in beside_methods().items():
        cls = registry.get(name)
        rows.append(
            (name, cls.acts_on, "stock" if cls.visual_only else "changed", cls.published, registry.describe(name))
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def intervention_details(name: str) -> list[str]:
    """Everything of one intervention, for a reader.

    Raises:
        UnknownName: no such intervention; the message has the near matches.
    """
    cls = beside_methods().get(name, INTERVENTIONS).get(name)
    doc = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or cls.__doc__ or "")
    said = {key: text for base in reversed(cls.__mro__) for key, text in described(base.__doc__ or "").items()}
    lines = [
        f"{name}: {doc.partition(chr(10))[0]}",
        "",
        f"source       {cls.published or 'none was given'}",
        f"rows         {cls.acts_on}",
        f"text alone   {'stock' if cls.visual_only else 'changed'}",
        "",
        "options, with their defaults:",
    ]
    for option in dataclasses.fields(cls):
        default = None if option.default is dataclasses.MISSING else option.default
        lines.append(f"  {option.name} = {default!r}")
        lines += [f"      {said[option.name]}"] if option.name in said else []
    return [*lines, "", doc.partition("\n")[2].strip()]
