"""Methods on one line: `holov(variant=official)@64`, `vtc_cls@64+var(p=0.4)`. Imports nothing heavy."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenprune.registry import beside_methods


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


@cache
def _strict_loader() -> Any:
    """PyYAML's safe loader, but a key that a mapping has twice is an error, as YAML says: PyYAML takes the last one.

    ruamel.yaml refuses it too, and reads other values out of the same text. It takes `1e-3` for a number and, in YAML
    1.2, `on` and `yes` for text and `010` for 10. PyYAML, which writes our files, writes the text "1e-3" without
    quotes; ruamel.yaml would read a number back. It takes three times as long, for these few lines saved.
    """
    import yaml
    from yaml.composer import ComposerError

    class StrictLoader(yaml.SafeLoader):
        # before `<<` is resolved: a key of one's own beside one that is merged is no second one
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            marks: dict[tuple[str, Any], Any] = {}
            for key, _ in node.value:
                first = marks.setdefault((key.tag, key.value), key.start_mark) if key.id == "scalar" else key.start_mark
                if first is not key.start_mark:
                    problem = f"the key {key.value!r} stands there again, after line {first.line + 1}; keep one of them"
                    raise ComposerError(None, None, problem, key.start_mark)
            return node

    return StrictLoader


def yaml_value(text: str, where: str) -> Any:
    """What a text means in YAML.

    Args:
        where: what the text is, for the message.

    Raises:
        ValueError: it is no YAML, or gives a key twice; the message says where.
    """
    import yaml

    try:
        return yaml.load(text, Loader=_strict_loader())
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ValueError(f"{where} is no YAML{place}: {' '.join(str(problem).split())}.") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be read.") from None
    except (ValueError, OverflowError) as error:  # a date of a 13th month, a number of thousands of digits
        raise ValueError(f"{where} has a value that is none: {error}.") from None


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ValueError: it is no text, no YAML, or gives a key twice; the message names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}.") from None
    return yaml_value(text, str(path))


def pruner_parts(text: str) -> list[str]:
    """Of `vtc_cls@64+var(p=0.4)`, the parts that prune: `["vtc_cls@64"]`."""
    beside = beside_methods()
    return [part for part in split_outside(text, "+") if split_name(part)[0] not in beside]
