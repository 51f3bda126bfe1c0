"""What the page says of a row beside its numbers: what the method does, its paper, and how to run it oneself."""

from __future__ import annotations

import re
import shlex
from typing import Any

from tokenprune.evals.config.points import NONE
from tokenprune.evals.results.records import ResultRecord
from tokenprune.plan.expression import split_name, split_outside
from tokenprune.registry import METHODS, beside_methods


def about(record: ResultRecord) -> dict[str, Any]:
    """`title`, `parts` (each with `name`, `does`, `source` and `arxiv`, the number of its paper or ""), `apply`, the
    lines of Python that apply it ("" for the unpruned model), and `command`, which measures it again."""
    unpruned = record["method"] == NONE
    names = [] if unpruned else [split_name(part)[0] for part in split_outside(record["method"], "+")]
    parts = [_part(name) for name in names]
    if unpruned:
        parts = [{"name": "unpruned", "does": "The model as it is.", "source": "", "arxiv": ""}]
    return {
        "title": "unpruned" if unpruned else record["label"], "parts": parts,
        "apply": "" if unpruned else snippet(record), "command": command(record),
    }  # fmt: skip


def _part(name: str) -> dict[str, str]:
    registry = beside_methods().get(name, METHODS)
    if name not in registry.names():  # a method of the user's own, in another process
        return {"name": name, "does": "", "source": "a method that is not installed here", "arxiv": ""}
    source = str(getattr(registry.get(name), "published", ""))
    number = re.search(r"arXiv (\d{4}\.\d{4,5})", source)
    return {
        "name": name, "does": registry.describe(name), "source": source, "arxiv": number[1] if number else "",
    }  # fmt: skip


def snippet(record: ResultRecord) -> str:
    """Python that applies a point to `model`; every digit is there."""
    given = [repr(record["method"])]
    if record["keep"] is not None:
        given.append(f"keep={record['keep']!r}")
    options = dict(record["options"])
    if all(name.isidentifier() for name in options):
        given += [f"{name}={value!r}" for name, value in options.items()]
    else:
        given.append(f"**{options!r}")
    line = f"handle = tokenprune.apply(model, {', '.join(given)})"
    if len(line) > 100:
        inner = "".join(f"    {one},\n" for one in given)
        line = f"handle = tokenprune.apply(\n    model,\n{inner})"
    return f"import tokenprune\n\n{line}\n"


def command(record: ResultRecord) -> str:
    """The command line that measures a point."""
    words = ["tokenprune", "eval", "--model", record["model"], "--tasks", record["task"], "--method", record["method"]]
    words += [] if record["keep"] is None else ["--keep", str(record["keep"])]
    for name, value in record["options"].items():
        words += ["--set", f"{name}={_yaml(value)}"]
    return shlex.join(words)


def _yaml(value: Any) -> str:
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()
    return text.removesuffix("...").strip()
