"""A page an intervention."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path

from pages import hallucination
from pages.docstring import described, escaped, module_docstring
from pages.methods import option_table, runnable
from tokenprune.commands._methods import described as said_of
from tokenprune.registry import INTERVENTIONS

WITH_OPTIONS = {"shortv": "shortv(calibration=pocket-llava)", "zerotuning": "zerotuning(gamma=1.5)"}
"""Those that need an option, or do nothing without one."""


def pages() -> dict[str, str]:
    """Markdown by path."""
    return {f"interventions/{name}.md": page(name) for name in INTERVENTIONS.names() if INTERVENTIONS.file_of(name)}


def snippet(name: str) -> str:
    """Python that runs it beside a method on a model that ships here."""
    return runnable("pocket-llava", f'"{plan(name)}"')


def plan(name: str) -> str:
    """The intervention beside a method, in one string."""
    return f"vtc_cls@64+{WITH_OPTIONS.get(name, name)}"


def page(name: str) -> str:
    """One intervention."""
    cls = INTERVENTIONS.get(name)
    parts = described(module_docstring(Path(str(INTERVENTIONS.file_of(name)))))
    said = {key: text for base in reversed(cls.__mro__) for key, text in said_of(base.__doc__ or "").items()}
    options = []
    for field in dataclasses.fields(cls):
        default = None if field.default is dataclasses.MISSING else field.default
        options.append({"name": field.name, "default": default, "means": said.get(field.name, "")})
    acts = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "") and str(cls.acts_on)
    lines = [
        f"# {name}", "", parts.does, "",
        "| | |", "|---|---|",
        f"| rows of the attention that it changes | {escaped(acts)} |",
        f"| a prompt without pictures | {'runs as the stock model' if cls.visual_only else 'is changed too'} |",
        f"| source | {escaped(cls.published or 'none was given')} |",
        "", "## Use it", "",
        "Alone by its name, or beside a method with `+` ([what an intervention is](../interventions.md)):", "",
        "```python", snippet(name), "```", "",
        "## How it works", "", parts.how or parts.does, "",
    ]  # fmt: skip
    for heading, body in parts.notes:
        lines += [f"### {escaped(heading)}", "", body, ""]
    lines += ["## Options", "", option_table(options), ""]
    if parts.sources:
        lines += ["## Source", "", *(f"- {kind}: {text}" for kind, text in parts.sources), ""]
    lines += hallucination.section(name)
    if name == "var":
        lines += ["More on sinks, channels and what was measured: [VAR](../var.md).", ""]
    return "\n".join(lines)
