"""How pictures are laid out, found out before the tower runs, of classes that only their features tell: the features
call is run without its blocks, which hand on what they are given.

What is left of it, the patch embedding and the projector, is a small part of its work, and says how many features
each picture has: that does not follow from what the blocks compute, and after the tower has run it is held against what
they made. Layouts are kept by the sizes that a call gives, so it is done once for pictures of one size.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.engine.tower_plan import OF_ANY_CALL
from tokenprune.hooks import Ledger
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.visual import Visual
from tokenprune.state.tower_recording import Recording

_forms: weakref.WeakKeyDictionary[Any, dict[type, Any]] = weakref.WeakKeyDictionary()
"""By tower and class of block, what stands behind the states in what it returns; None where it returns them alone."""


def skipped(tower: Any, block: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a block returns if it changes nothing. The first of its class is run, to see in what form it answers.

    Args:
        tower: that it is of.
        forward: its own.
    """
    forms = _forms.setdefault(tower, {})
    kind = type(block)
    if kind not in forms:
        with torch.no_grad():
            made = forward(*args, **kwargs)
        more = made[1:] if isinstance(made, tuple) else None
        if more is not None and any(part is not None for part in more):
            return made  # with something that only the block knows
        forms[kind] = more
    states = args[0] if args else kwargs.get("hidden_states")
    if states is None:  # under another name, so it cannot be told what to hand on
        return forward(*args, **kwargs)
    return states if forms[kind] is None else (states, *forms[kind])


_LAYOUTS = 64  # that are kept
_NUMBERS = 1024  # most whole numbers of an argument that are compared


class Layouts:
    """Visuals of calls, by what those gave but the pixels themselves."""

    def __init__(self) -> None:
        self._known: dict[Any, list[Visual]] = {}

    def of(
        self,
        adapter: Adapter,
        kind: str,
        original: Callable[..., Any],
        call: Mapping[str, Any],
        named: Mapping[str, Any],
    ) -> list[Visual]:
        """See `laid_out`."""
        given = sorted((item for item in call.items() if item[0] not in OF_ANY_CALL), key=lambda item: item[0])
        key = None if named[adapter.pixels[kind]].dim() > 4 else (kind, *map(_sizes, given))
        if key is None or None in key:  # tiles that fill up a batch are told by their pixels
            return laid_out(adapter, kind, original, call, named)
        if key not in self._known:
            if len(self._known) >= _LAYOUTS:
                self._known.pop(next(iter(self._known)))
            self._known[key] = laid_out(adapter, kind, original, call, named)
        return self._known[key]


def _sizes(argument: tuple[str, Any]) -> Any:
    """What is compared of an argument of a call; None where that is too much, or not known."""
    name, value = argument
    if isinstance(value, (list, tuple)):
        parts = [_sizes((name, part)) for part in value]
        return None if None in parts or len(parts) > _NUMBERS else (name, *parts)
    if not isinstance(value, Tensor):
        return (name, value) if isinstance(value, (bool, int, float, str, type(None))) else None
    if value.is_floating_point():
        return name, value.dtype, value.shape
    return (name, value.shape, tuple(value.flatten().tolist())) if value.numel() <= _NUMBERS else None


def laid_out(
    adapter: Adapter, kind: str, original: Callable[..., Any], call: Mapping[str, Any], named: Mapping[str, Any]
) -> list[Visual]:
    """The visuals of a features call of a family that lays them out behind the tower.

    Args:
        kind: "image" or "video".
        original: the features call.
        call: its arguments, by name.
        named: the same, with the pixels under the family's name for them.
    """
    vision, ledger = adapter.vision, Ledger()
    try:
        for block in vision.blocks:
            ledger.set(block, "forward", functools.partial(skipped, vision.module, block, block.forward))
        with torch.no_grad():
            output = original(**call)
    finally:
        ledger.undo()
    return adapter.visuals_behind(kind, named, output)


def check_lengths(adapter: Adapter, recording: Recording) -> None:
    """Raise ValueError unless the tower made as many features of each picture as it was laid out for."""
    planned, made = [own.length for own in recording.visuals], [len(own) for own in recording.features]
    if planned != made:
        raise ValueError(
            f"{type(adapter.model).__name__} made {made} features of pictures, and {planned} without the blocks of its "
            "vision tower: how many there are follows from what these compute, so nothing can leave inside. Cut at "
            "'input'."
        )
