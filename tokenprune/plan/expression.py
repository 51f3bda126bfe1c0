"""Methods on one line: `holov(variant=official)@64`, `vtc_cls@64+var(p=0.4)`. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
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
        option, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"An option of {name!r} is written name=value, got {part!r}.")
        options[option.strip()] = yaml_value(value, f"{option.strip()} of {name!r}")
    return name.strip(), options, budget if at else None


def yaml_value(text: str, where: str) -> Any:
    """What a text means in YAML.

    Args:
        where: what the text is, for the message.

    Raises:
        ValueError: it is no YAML; the message says where it breaks.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ValueError(f"{where} is no YAML{place}: {' '.join(str(problem).split())}.") from None


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ValueError: it is no text, or no YAML; the message names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}.") from None
    return yaml_value(text, str(path))


def pruner_parts(text: str) -> list[str]:
    """Of `vtc_cls@64+var(p=0.4)`, the parts that prune: `["vtc_cls@64"]`."""
    return [part for part in split_outside(text, "+") if split_name(part)[0] not in INTERVENTIONS.names()]
