"""What a method may ask for, by name, before the forward pass runs.

A signal is recorded while the model runs anyway; only the layers that were asked for are recorded, and never a full
attention matrix. Methods name signals; adapters know how to record them.
"""

from __future__ import annotations

from dataclasses import dataclass

CLS_ATTENTION = "cls_attention"
"""Attention of the vision tower's [CLS] query to each patch in one block: softmax over [CLS] and patches in fp32, mean
over heads, the [CLS] column dropped and the rest not renormalised. `[M, N]`."""

KNOWN = (CLS_ATTENTION,)


@dataclass(frozen=True)
class Signal:
    """A request: the signal called `name`, of vision block `layer` (0-based)."""

    name: str
    layer: int


@dataclass(frozen=True)
class Tower:
    """What a method may know of the vision tower.

    Attributes:
        num_layers: transformer blocks.
        feature_layer: 0-based block whose output becomes the visual tokens (LLaVA-1.5: 22 of 0..23).
        has_cls: whether a [CLS] token is there.
        num_heads: attention heads a block.
        hidden_size: width.
    """

    num_layers: int
    feature_layer: int
    has_cls: bool
    num_heads: int
    hidden_size: int
