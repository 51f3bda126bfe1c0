"""Hands query, key and mask of every decoder layer to a reader, and lets the layer go on as it would.

As interventions do, each attention module of this one model gets a copy of its config that names a private attention
function; masks are made from the decoder's own config, which stays as it is. A method that is applied inside the tap
finds the private function where the stock one was, so what it hands to attention, biased keys among it, is read.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenprune.hooks import Ledger, opaque
from tokenprune.interfaces.adapter import Adapter
from tokenprune.wrappers import AsConfigured, unwrap


@dataclass(frozen=True)
class Call:
    """One layer's attention in one call.

    Attributes:
        layer: which, from 0.
        query: `[B, H, R, d]`, rotated.
        key: `[B, Hk, K, d]`, rotated: those of the cache and of the call.
        mask: as the layer was given it.
        scale: of the products.
        window: how many keys back a row sees, where flash attention is told so beside the mask; else None.
    """

    layer: int
    query: Tensor
    key: Tensor
    mask: Any
    scale: float
    window: int | None


class Reader(Protocol):
    """What listens."""

    def read(self, call: Call) -> None:
        """Called before the attention of each layer."""


class AttentionTap:
    """The tap of one model.

    Args:
        adapter: the model's family.

    Attributes:
        reader: who listens; None: nobody.

    Raises:
        ValueError: a layer's attention cannot be reached.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.reader: Reader | None = None
        kind = str(getattr(adapter.language_model.config, "_attn_implementation", None) or "eager")
        if any(word in kind for word in ("flex", "paged")):
            raise ValueError(
                f"Diagnostics read the mask of a layer, and {kind!r} has none that can be read. Load the model with "
                "attn_implementation='sdpa', 'eager' or a flash attention."
            )
        self._places = {unwrap(adapter.attention(layer)): number for number, layer in enumerate(adapter.layers)}
        self._stock: dict[int, tuple[Any, Any]] = {}
        self._interfaces: Any = None

    @contextmanager
    def installed(self) -> Iterator[AttentionTap]:
        """In place for the length of a `with` block."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ledger, name = Ledger(), f"tokenprune_diagnose_{id(self):x}"
        self._interfaces = ALL_ATTENTION_FUNCTIONS
        try:
            ALL_ATTENTION_FUNCTIONS[name] = opaque(self._attention)
            ledger.add(lambda: ALL_ATTENTION_FUNCTIONS.pop(name) and None)
            for module, layer in self._places.items():
                eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
                if eager is None or not hasattr(module, "config"):
                    raise ValueError(
                        f"{type(module).__name__} chooses its attention function in a way that is not known here, so "
                        "what it attends to cannot be read."
                    )
                self._stock[layer] = module.config, eager
                renamed = copy.copy(module.config)
                renamed._attn_implementation = name
                ledger.set(module, "config", renamed)
            yield self
        finally:
            ledger.undo()

    def _attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        layer = self._places[module]
        if self.reader is not None:
            scale, window = kwargs.get("scaling") or query.shape[-1] ** -0.5, kwargs.get("sliding_window")
            with torch.no_grad():
                self.reader.read(Call(layer, query.detach(), key.detach(), attention_mask, scale, window))
        config, eager = self._stock[layer]
        stock = self._interfaces.get_interface(config._attn_implementation, eager)
        asking = module if "flash" not in str(config._attn_implementation) else AsConfigured(module, config)
        return stock(asking, query, key, value, attention_mask, **kwargs)
