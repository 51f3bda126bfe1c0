"""What tests prove: the tables of docs/support.md and adapters/capabilities.yaml."""

from __future__ import annotations

from functools import cache

import yaml

from pages.places import DOCS, ROOT


@cache
def cells() -> dict[str, dict[str, str]]:
    """By method and family what docs/support.md says: "4 of 4", or "-" where the pair is refused."""
    text = (DOCS / "support.md").read_text(encoding="utf-8")
    part = text.partition("<!-- cells:begin -->")[2].partition("<!-- cells:end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    heads = rows[0][1:]
    return {row[0].strip("`"): dict(zip(heads, row[1:])) for row in rows[2:]}


@cache
def capabilities() -> dict[str, dict[str, str]]:
    """By class of transformers what works on it."""
    return yaml.safe_load((ROOT / "adapters" / "capabilities.yaml").read_text(encoding="utf-8"))


def of_method(method: str) -> str:
    """Families on which a method was tested, as a table of one line."""
    row = cells().get(method)
    if row is None:
        return ""
    heads = [f"[{name}](../families/{name}.md)" for name in row]
    said = ["refused" if cell == "-" else cell for cell in row.values()]
    return f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n| {' | '.join(said)} |"


def of_classes(classes: list[str]) -> str:
    """What works on classes, as a table; "" where none of them was tested."""
    known = {cls: capabilities()[cls] for cls in classes if cls in capabilities()}
    if not known:
        return ""
    heads = list(next(iter(known.values())))
    lines = [f"| class | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    lines += [f"| `{cls}` | {' | '.join(row[head] for head in heads)} |" for cls, row in known.items()]
    return "\n".join(lines)
