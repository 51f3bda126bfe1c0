"""Masks that were made for the whole rows of a call, and what a layer sees of them once tokens left.

Most decoders are given a 2-D mask and make their own masks, for the rows and keys that are left. Two things do not
survive that: a merging module that makes the masks itself, because pictures see themselves in both directions, and
windows and chunks, which are counted in places of the row. There the masks are those of the whole rows, with a column
for every token that the caller counts, and a layer gets the rows of its tokens and the columns of the keys it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.seams import cache_argument
from tokenprune.state.call_inputs import CallInputs

RECURRENT = ("linear_attention", "conv")
"""Kinds of layers that go along the row: their mask is `[B, S]`, and what left is not passed by."""

_MAKERS = {
    "": "create_causal_mask",
    "full_attention": "create_causal_mask",
    "sliding_attention": "create_sliding_window_causal_mask",
    "chunked_attention": "create_chunked_causal_mask",
    "indexed_attention": "create_causal_mask",
    "linear_attention": "create_recurrent_attention_mask",
    "conv": "create_recurrent_attention_mask",
}
_MORE: dict[str, dict[str, Any]] = {"indexed_attention": {"allow_is_causal_skip": False}}
"""Layers that choose keys always have a mask, in which they choose."""


def reach(config: Any) -> int | None:
    """How many tokens the layers of a decoder see, where some do not see all: a window, or a chunk; None: all see
    all."""
    kinds = getattr(config, "layer_types", None)
    found = []
    if kinds is None or "sliding_attention" in kinds:
        found.append(getattr(config, "sliding_window", None))
    if kinds is not None and "chunked_attention" in kinds:
        found.append(getattr(config, "attention_chunk_size", None))
    return min((size for size in found if size is not None), default=None)


def make_masks(config: Any, inputs: CallInputs, window: int) -> Any:
    """The masks that a decoder would make for the whole rows of a call: by kind of layer, or one for all.

    Args:
        config: the decoder's.
        inputs: what it was given; its cache counts whole rows.
        window: what some layers see, for the message.

    Raises:
        ValueError: its windows cannot be counted in whole rows.
    """
    from transformers import masking_utils

    attention = str(getattr(config, "_attn_implementation", None) or "eager")
    kinds = set(getattr(config, "layer_types", None) or ())
    others = sorted(kinds - set(_MAKERS))
    if others or attention not in ("sdpa", "eager"):
        why = f"has layers of the kind {others[0]}" if others else f"runs with {attention!r}, which counts what is left"
        raise ValueError(
            f"Layers of this decoder see {window} tokens only, and the prompt with its answer has "
            f"{inputs.past + inputs.length}: what they see is counted in tokens of the whole prompt, and this decoder "
            f"{why}. Load the model with attn_implementation='sdpa', or keep prompts shorter."
        )
    given = {
        "config": config,
        "inputs_embeds": inputs.embeds,
        "attention_mask": inputs.mask,
        "position_ids": None,
        **cache_argument(inputs.cache),
    }
    if kinds:
        return {kind: getattr(masking_utils, _MAKERS[kind])(**given, **_MORE.get(kind, {})) for kind in kinds}
    return masking_utils.create_sliding_window_causal_mask(**given)


@dataclass(frozen=True)
class HeldKeys:
    """The keys that a layer attends to in one call.

    Attributes:
        places: `[B, K]` int64, the place in the whole row of each, of no meaning at padding.
        real: `[B, K]` bool, False at padding that cuts made; None: there is none.
        past: how many of them were there before the call.
    """

    places: Tensor
    real: Tensor | None
    past: int


class WholeMasks:
    """The masks of one call.

    Args:
        made: by kind of layer, or one for all: 4-D bool or additive, 2-D, or None for all that comes before.
        length: tokens that the caller counts, those of the cache and of the call.
        flash: whether 2-D masks say which keys are padding.
    """

    def __init__(self, made: Any, length: int, flash: bool) -> None:
        self._made, self._length, self._flash = made, length, flash

    @property
    def kinds(self) -> list[str] | None:
        """Kinds of layers that have a mask of their own; None where one is for all."""
        return list(self._made) if isinstance(self._made, Mapping) else None

    def of(self, kind: str) -> Any:
        """The mask of a kind of layers, as it was made."""
        return self._made[kind] if isinstance(self._made, Mapping) else self._made

    def fitted(self, kind: str, index: Tensor | None, rows: Tensor, keys: HeldKeys) -> Any:
        """The mask of a layer of some kind.

        Args:
            index: `[B, P]`, where each row of its tokens stands among the rows of the call; None: they are all there.
            rows: `[B, P]`, the same in the whole row.
            keys: what the layer holds.

        Raises:
            ValueError: the mask is of a form that cannot be cut.
        """
        mask = self.of(kind)
        if mask is None:
            return self._of_causal(rows, keys)
        if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
            raise ValueError(
                f"A layer is given a {type(mask).__name__} for a mask; tokens can leave with SDPA, eager and flash "
                "attention only. Load the model with attn_implementation='sdpa'."
            )
        columns = keys.places.to(mask.device)
        if mask.dim() == 2:
            taken = mask.gather(1, (columns - (self._length - mask.shape[1])).clamp(min=0))
            return taken if keys.real is None else taken * keys.real.to(mask.dtype)
        mask = mask.expand(columns.shape[0], *mask.shape[1:])
        # a cache that was not cut may have made columns for the last tokens only
        columns = (columns - (self._length - mask.shape[3])).clamp(min=0)[:, None, None]
        if index is not None:
            picked = index.to(mask.device)[:, None, :, None]
            mask = mask.gather(2, picked.expand(-1, mask.shape[1], -1, mask.shape[3]))  # [B, 1, P, all keys]
        mask = mask.gather(3, columns.expand(-1, mask.shape[1], mask.shape[2], -1))  # [B, 1, P, K]
        if keys.real is None:
            return mask
        closed = ~keys.real.to(mask.device)[:, None, None]  # [B, 1, 1, K]
        if mask.dtype == torch.bool:
            return see_something(mask & ~closed, keys.past)
        return mask.masked_fill(closed, torch.finfo(mask.dtype).min)

    def _of_causal(self, rows: Tensor, keys: HeldKeys) -> Tensor | None:
        """SDPA forms no mask where every token sees all that come before it, but padding has to be hidden."""
        if keys.real is None:
            return None
        if self._flash:
            return keys.real.to(torch.int64)
        before = keys.places[:, None] <= rows[..., None]  # [B, P, K]
        return see_something((before & keys.real[:, None])[:, None], keys.past)


def seen_by_row(mask: Any) -> Tensor | None:
    """`[B, P, K]` bool, which keys each row sees by a layer's mask; None: all that come before it."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2


def see_something(allowed: Tensor, past: int) -> Tensor:
    """Rows of padding that see no key see themselves, so that their softmax has something to divide by.

    Args:
        allowed: `[B, 1, P, K]` bool.
        past: keys before those of the rows themselves.
    """
    queries = allowed.shape[-2]
    itself = torch.eye(queries, allowed.shape[-1] - past, dtype=torch.bool, device=allowed.device)
    itself = torch.cat([torch.zeros(queries, past, dtype=torch.bool, device=allowed.device), itself], dim=1)
    return allowed | (itself & ~allowed.any(-1, keepdim=True))
