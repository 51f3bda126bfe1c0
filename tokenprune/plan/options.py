"""Whether a value that a user wrote is of the kind that an option takes, read off the option's annotation."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import Field
from numbers import Integral, Real
from typing import Any

_KINDS = {"int": (Integral, "an integer"), "float": (Real, "a number"), "bool": (bool, "true or false"),
          "str": (str, "a text")}  # fmt: skip
_LIST = re.compile(r"(?:list|tuple|Sequence)\[(\w+)(?:, \.\.\.)?\]")


def check_kind(name: str, field: Field[Any], value: Any) -> None:
    """Raise TypeError unless a value is what the field's annotation says; annotations of other kinds say nothing.

    Args:
        name: of the method, for the message.
    """
    wanted = list(dict.fromkeys(part.strip() for part in str(field.type).split("|")))
    if "None" in wanted:
        if value is None:
            return
        wanted.remove("None")
    expected = [_expected(part) for part in wanted]
    if None in expected or any(_fits(part, value) for part in wanted):
        return
    said = " or ".join(dict.fromkeys(text for text in expected if text))
    raise TypeError(f"{field.name} of {name} must be {said}, got {value!r}.")


def _expected(part: str) -> str | None:
    several = _LIST.fullmatch(part)
    if several:
        return {"int": "a list of integers", "float": "a list of numbers"}.get(several[1])
    return _KINDS[part][1] if part in _KINDS else None


def _fits(part: str, value: Any) -> bool:
    several = _LIST.fullmatch(part)
    if several:
        if not isinstance(value, Collection) or isinstance(value, (str, bytes, Mapping)):
            return False
        # which layers and heads there are is for the method to say
        return several[1] == "int" or all(_fits(several[1], one) for one in value)
    # True is an int to Python, and to nobody who writes an option
    if not isinstance(value, _KINDS[part][0]) or (isinstance(value, bool) and part != "bool"):
        return False
    return not (isinstance(value, float) and math.isnan(value))
