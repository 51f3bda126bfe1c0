"""Queries, keys and values of a vision tower's attention, as its module hands them to its attention function: with
norms, rotation and scale in them, whatever the family calls its projections and however it turns its heads.

The module, that of one model object, gets a copy of its config that names a private function, which notes what it is
given and calls whatever the config named before. The tower's own config, of which masks are made, stays as it is.
"""

from __future__ import annotations

import copy
import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.hooks import Ledger, Scratch, opaque
from tokenprune.wrappers import AsConfigured


@dataclass(frozen=True)
class Attended:
    """What one run of an attention module computed.

    Attributes:
        query, key, value: `[b, H, T, d]`, keys and values repeated where heads share them; products of queries with
            keys are to be taken over the square root of d.
        mixed: `[b, H, T, d]`, what attention made of the values.
        parts: T of each call of the attention function, where the module attends to parts of a row one after the other.
        mask: `[b or 1, 1, T, T]` or None, of a run in one part.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mixed: Tensor
    parts: tuple[int, ...]
    mask: Any = None


def attention_in(block: Any) -> nn.Module | None:
    """The module in a block of a tower that calls an attention function by its config's name; None if there is none."""
    found = [
        module
        for module in block.modules()
        if module is not block and hasattr(module, "config") and eager_of(module) is not None and _asks(module)
    ]
    return found[0] if len(found) == 1 else None


def eager_of(module: Any) -> Any:
    """The eager attention function of a module's file; None if it has none."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _asks(module: Any) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


class AttentionCalls:
    """Reads an attention module; `remove` leaves it as it was.

    Args:
        attention: see `attention_in`.
        done: called with what it computed each time that it ran.
    """

    def __init__(self, attention: Any, done: Callable[[Attended], None]) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self._stock, self._eager, self._done = attention.config, eager_of(attention), done
        self._interfaces, self._seen, self._ledger = ALL_ATTENTION_FUNCTIONS, Scratch(), Ledger()
        before = str(getattr(self._stock, "_attn_implementation", None) or "eager")
        # modules ask by this word in the name whether their row may stay whole
        name = f"tokenprune_{'flash_' if 'flash' in before else ''}{id(self):x}"
        ALL_ATTENTION_FUNCTIONS[name] = opaque(_weakly(self))
        self._ledger.add(lambda: ALL_ATTENTION_FUNCTIONS.pop(name) and None)
        renamed = copy.copy(self._stock)
        renamed._attn_implementation = name
        self._ledger.set(attention, "config", renamed)
        self._ledger.hook(attention.register_forward_hook(opaque(self._on_done)))

    def remove(self) -> None:
        """Leave the module as it was."""
        self._ledger.undo()

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        """What the module's config asks for, noted."""
        kind = str(getattr(self._stock, "_attn_implementation", None) or "eager")
        function = self._interfaces.get_interface(kind, self._eager)
        asking = AsConfigured(module, self._stock) if "flash" in kind else module
        made = function(asking, query, key, value, mask, **kwargs)
        scale = kwargs.get("scaling")
        calls = self._seen.values.setdefault("calls", [])
        calls.append((*(part.detach() for part in (query, key, value, made[0])), mask, scale))
        return made

    def _on_done(self, module: Any, args: Any, output: Any) -> None:
        (calls,) = self._seen.take("calls")
        self._done(_joined(calls))


def _weakly(calls: AttentionCalls) -> Callable[..., Any]:
    """The function that is registered: it does not keep alive what it calls."""
    reference = weakref.ref(calls)

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        own = reference()
        if own is None:
            raise RuntimeError(
                "The attention of a vision tower was read by a handle that is gone; load the model again."
            )
        return own.attend(module, query, key, value, attention_mask, **kwargs)

    return attend


def _joined(calls: list[tuple[Any, ...]]) -> Attended:
    if len(calls) > 1 and any(call[0].shape[0] != 1 for call in calls):
        raise ValueError("An attention module of the vision tower called its attention function several times a batch.")
    width, scale = calls[0][0].shape[-1], calls[0][5]
    query, key, value = (torch.cat([call[part] for call in calls], dim=2) for part in range(3))
    mixed = torch.cat([call[3] for call in calls], dim=1).transpose(1, 2)  # [b, T, H, d] -> [b, H, T, d]
    if scale is not None and abs(scale * width**0.5 - 1) > 1e-6:
        query = query * (scale * width**0.5)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    parts = tuple(call[0].shape[2] for call in calls)
    return Attended(query, key, value, mixed, parts, calls[0][4] if len(calls) == 1 else None)


class HidingAttention(AttentionCalls):
    """Computes an attention module in the open, without the keys of some rows, for some of its rows; for one run.

    Args:
        attention: see `attention_in`.
        gone: `[M, T]` or `[1, T]` bool, the rows whose keys nothing sees.
        rows: how many of the others are computed of each row of states and of each part that is attended to by itself.
    """

    def __init__(self, attention: Any, gone: Tensor, rows: int) -> None:
        self._gone, self._rows, self._place = gone, rows, 0
        self.computed = torch.zeros_like(gone)
        super().__init__(attention, lambda attended: None)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        batch, heads, length, width = query.shape
        super().attend(module, query, key, value, mask, **kwargs)  # others may read this module too
        self._seen.values.clear()
        gone = self._gone[:, self._place : self._place + length]
        done = self.computed[:, self._place : self._place + length]
        self._place += length
        if gone.shape != (batch, length):
            raise ValueError(f"its attention is over {batch} rows of {length}, and its states are not")
        scale = width**-0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
        mixed = value.new_zeros(batch, length, heads, value.shape[-1])
        for row in range(batch):
            there = (~gone[row]).nonzero()[:, 0]
            if not len(there):
                continue
            chosen = there[torch.linspace(0, len(there) - 1, min(self._rows, len(there)), device=there.device).long()]
            keys, values = (part[row].repeat_interleave(heads // part.shape[1], 0).float() for part in (key, value))
            scores = query[row, :, chosen].float() @ keys.transpose(1, 2) * scale + _added(mask, row, chosen, batch)
            weights = scores.masked_fill(gone[row], float("-inf")).softmax(-1)
            mixed[row, chosen] = (weights @ values).transpose(0, 1).to(mixed.dtype)
            done[row, chosen] = True
        return mixed, None

    def _on_done(self, module: Any, args: Any, output: Any) -> None:
        pass


def _added(mask: Any, row: int, chosen: Tensor, batch: int) -> Any:
    """What a mask adds to the scores of some rows; 0 without one."""
    if mask is None:
        return 0.0
    own = mask[row if mask.shape[0] == batch else 0]
    own = own if own.dim() == 1 else own[..., chosen, :]
    if own.dtype == torch.bool:
        return torch.zeros(own.shape, device=own.device).masked_fill(~own, torch.finfo(torch.float32).min)
    return own.float() if own.is_floating_point() else (1.0 - own.float()) * torch.finfo(torch.float32).min
