"""Methods on one line: `holov(variant=official)@64`, `vtc_cls@64+var(p=0.4)`. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

from tokenprune.registry import INTERVENTIONS


def split_outside(text: str, mark: str) -> list[str]:
    """`text` split at `mark`, but not inside brackets; parts are stripped."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == mark and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def split_name(text: str) -> tuple[str, dict[str, Any], str | None]:
    """`holov(variant=official)@64` to its name, options (values read as YAML) and the text of its budget.

    Raises:
        ValueError: brackets that do not close, or an option without "=".
    """
    head, at, budget = text.rpartition("@") if "@" in text else (text, "", "")
    name, bracket, inner = head.partition("(")
    if bracket and not inner.endswith(")"):
        raise ValueError(f"The brackets of {text!r} do not close; write it like holov(variant=official)@64.")
    options: dict[str, Any] = {}
    for part in split_outside(inner[:-1], ",") if inner[:-1].strip() else ():
        import yaml

        option, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"An option of {name!r} is written name=value, got {part!r}.")
        options[option.strip()] = yaml.safe_load(value)
    return name.strip(), options, budget if at else None


def pruner_parts(text: str) -> list[str]:
    """Of `vtc_cls@64+var(p=0.4)`, the parts that prune: `["vtc_cls@64"]`."""
    return [part for part in split_outside(text, "+") if split_name(part)[0] not in INTERVENTIONS.names()]
