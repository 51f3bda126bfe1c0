"""Whether what was read from a file has the shape that its `TypedDict` says: files are edited, cut off and mixed up."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

ALTERED = "The file is not as this version writes it: it was edited or cut off, or another version wrote it."


def check_shape(value: Any, kind: Any, where: str, needed: Iterable[str] = (), whole: Collection[Any] = ()) -> None:
    """Raise ValueError, with the place of what is wrong, unless what is there of `value` is of `kind`.

    Args:
        kind: a TypedDict, or any annotation of JSON values; an int is a float too. Keys that a TypedDict has and the
            value has not are no error: older files lack some.
        where: the name of the value, for the message.
        needed: keys that must be there.
        whole: TypedDicts, `kind` or inside it, of which every required key must be there.
    """
    problem = _problem(value, kind, whole)
    missing = [key for key in needed if problem is None and key not in value]
    if missing:
        problem = "", f"lacks {missing[0]!r}"
    if problem is not None:
        path, says = problem
        raise ValueError(f"{where}{path} {says}. {ALTERED}")


def _problem(value: Any, kind: Any, whole: Collection[Any]) -> tuple[str, str] | None:
    """The first thing that is wrong: its path, and what."""
    if kind is Any:
        return None
    if is_typeddict(kind):
        return _of_mapping(value, kind, whole)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        problems = [_problem(value, one, whole) for one in inner]
        return None if None in problems else max((one for one in problems if one), key=lambda one: len(one[0]))
    if origin is list or origin is dict:
        if not isinstance(value, origin):
            return "", f"must be {'a list' if origin is list else 'a mapping'}, got {_short(value)}"
        items = enumerate(value) if isinstance(value, list) else value.items()
        found = ((key, _problem(one, inner[-1], whole)) for key, one in items)
        return next(((f"[{key!r}]{problem[0]}", problem[1]) for key, problem in found if problem), None)
    if kind in (None, NoneType):
        return None if value is None else ("", f"must be nothing, got {_short(value)}")
    wanted: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if isinstance(value, wanted) and (kind is bool or not isinstance(value, bool)):
        return None
    return "", f"must be a {kind.__name__}, got {_short(value)}"


def _of_mapping(value: Any, kind: Any, whole: Collection[Any]) -> tuple[str, str] | None:
    if not isinstance(value, Mapping):
        return "", f"must be a mapping, got {_short(value)}"
    hints = _hints(kind)
    found = ((key, _problem(value[key], hints[key], whole)) for key in hints if key in value)
    missing = sorted(kind.__required_keys__ - set(value)) if kind in whole else ()
    lacks = ("", f"lacks {missing[0]!r}") if missing else None
    return next(((f"[{key!r}]{problem[0]}", problem[1]) for key, problem in found if problem), lacks)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
