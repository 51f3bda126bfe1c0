"""What a forward call was given, read off its arguments in one place."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokenprune.seams import cache_of


class CallInputs:
    """Arguments of a forward call of a model or its decoder: tokens, mask, positions and KV cache.

    B rows; S tokens of this call, padding counted; P tokens that the caller counts in the cache, pruned ones too.

    Attributes:
        arguments: all of them, by name.
        ids: `[B, S]` int64; None where embeddings came.
        embeds: `[B, S, D]`; None where ids came.
        mask: as given, `[B, P + S]` or another form; None without padding.
        positions: as given, `[B or 1, S]` or `[3, B or 1, S]`; None if the caller counts none.
        cache: the KV cache, whatever the installed release calls it; None if there is none.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments
        self.ids: Tensor | None = arguments.get("input_ids")
        self.embeds: Tensor | None = arguments.get("inputs_embeds")
        self.mask: Any = arguments.get("attention_mask")
        self.positions: Any = arguments.get("position_ids")
        self.cache: Any = cache_of(arguments)

    @cached_property
    def past(self) -> int:
        """P."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    @property
    def batch_size(self) -> int:
        """B; 0 where neither ids nor embeddings came."""
        tokens = self.embeds if self.ids is None else self.ids
        return 0 if tokens is None else tokens.shape[0]

    @property
    def length(self) -> int:
        """S; 0 where neither ids nor embeddings came."""
        tokens = self.embeds if self.ids is None else self.ids
        return 0 if tokens is None else tokens.shape[1]

    @property
    def new_mask(self) -> Tensor | None:
        """`[B, S]` of the mask's own kind, the columns of this call; None without a 2-D mask."""
        if not isinstance(self.mask, Tensor) or self.mask.dim() != 2:
            return None
        return self.mask[:, self.mask.shape[1] - self.length :]

    def attended(self, device: Any) -> Tensor | None:
        """`[B, S]` bool on `device`, False at padding; None without a 2-D mask."""
        mask = self.new_mask
        return None if mask is None else mask.to(device=device, dtype=torch.bool)

    @property
    def past_mask(self) -> Tensor | None:
        """`[B, P]` of the mask's own kind, the columns of the cache; None without a 2-D mask."""
        if not isinstance(self.mask, Tensor) or self.mask.dim() != 2:
            return None
        return self.mask[:, : self.past]

    @property
    def text_positions(self) -> Tensor | None:
        """`[B, S]` positions in the text, of 3-D ids the first; None where none came, or for other tokens."""
        if not isinstance(self.positions, Tensor):
            return None
        positions = self.positions if self.positions.dim() == 2 else self.positions[0]
        return positions.expand(self.batch_size, -1) if positions.shape[-1] == self.length else None
