"""The rows of a tower's blocks that are left once cells are gone, and what goes by row cut alike: masks, rotations,
boundaries of pictures and windows, whatever a family calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class ShortRows:
    """Which rows stay, of blocks whose states are `[M, T, D]` (a row of patches for each picture), `[1, T, D]` or
    `[T, D]` (the patches of all pictures in one).

    Attributes:
        length: T.
        rows: `[M, k]` int64, or `[k]`: the places that stay among T; shorter rows of a batch are filled up.
        counts: by picture how many of its k are its own, where each has a row; else ().
        before: `[T + 1]` int64 on the CPU, how many rows are left before each place, where all pictures stand in one.
    """

    length: int
    rows: Tensor
    counts: tuple[int, ...] = ()
    before: Tensor | None = None
    _made: dict[int, tuple[Tensor, Any]] = field(default_factory=dict)

    @classmethod
    def of_batch(cls, length: int, kept: Sequence[Tensor], device: torch.device) -> ShortRows:
        """Each picture has a row; `kept` are the places that stay in it, `[k]` on the CPU."""
        counts = tuple(len(own) for own in kept)
        rows = torch.zeros(len(kept), max(counts), dtype=torch.int64)
        for picture, own in enumerate(kept):
            rows[picture, : len(own)] = own
        return cls(length, rows.to(device), counts)

    @classmethod
    def of_one(cls, length: int, kept: Tensor, device: torch.device) -> ShortRows:
        """All pictures stand in one row; `kept` `[k]` are the places that stay, on the CPU, increasing."""
        there = torch.zeros(length, dtype=torch.int64)
        there[kept] = 1
        before = torch.cat([there.new_zeros(1), there.cumsum(0)])
        return cls(length, kept.to(device), before=before)

    @property
    def filled_up(self) -> bool:
        """Whether rows are filled up to the longest, so that a mask is needed."""
        return bool(self.counts) and min(self.counts) != max(self.counts)

    def hidden(self, states: Tensor) -> Tensor:
        """`[.., k, D]` of states at full length.

        Raises:
            ValueError: they are of another length.
        """
        if states.shape[-2] != self.length:
            raise ValueError(f"a block is given {states.shape[-2]} rows, and the one before it had {self.length}")
        return self._rows_of(states)

    def restored(self, states: Tensor) -> Tensor:
        """`[.., T, D]` of the states of the rows that stay: zeros at the others."""
        if not self.counts:
            full = states.new_zeros(*states.shape[:-2], self.length, states.shape[-1])
            return full.index_copy(states.dim() - 2, self.rows, states)
        full = states.new_zeros(states.shape[0], self.length, states.shape[-1])
        if not self.filled_up:
            return full.scatter(1, self.rows[..., None].expand_as(states), states)
        for picture, count in enumerate(self.counts):
            full[picture, self.rows[picture, :count]] = states[picture, :count]
        return full

    # --- what blocks are given beside their states --------------------------------------------------------------------

    def given(self, name: str, value: Any) -> Any:
        """An argument of a block, cut as its states are.

        Args:
            name: what it is called: boundaries and masks are known by it.
            value: tensors, and sequences and mappings of them; what has no dimension of T rows is handed on.
        """
        if isinstance(value, (tuple, list)):
            return type(value)([self.given(name, part) for part in value])
        if isinstance(value, Mapping):
            return {key: self.given(f"{name}.{key}", part) for key, part in value.items()}
        if not isinstance(value, Tensor):
            return value
        known = self._made.get(id(value))
        if known is None:  # all blocks are given the same; the tensor is kept, so that no other one gets its number
            known = self._made[id(value)] = value, self._cut(name, value)
        return known[1]

    def _cut(self, name: str, value: Tensor) -> Tensor:
        if "cu_seq" in name:
            if self.before is None:
                raise ValueError(f"a block is given {name}, boundaries in one row, and a batch of {len(self.counts)}")
            return self.before[value.cpu().long()].unique_consecutive().to(value)
        if "mask" in name:
            return self._mask(value)
        return self._rows_of(value) if self.length in value.shape else value

    def _mask(self, mask: Tensor) -> Tensor:
        """Of a mask over rows, or over pairs of them in its last two dimensions."""
        pairs = mask.dim() > 1 and mask.shape[-2] == mask.shape[-1] == self.length
        if not pairs:
            return self._rows_of(mask) if self.length in mask.shape else mask
        if not self.counts:
            return mask.index_select(-2, self.rows).index_select(-1, self.rows)
        by_picture = mask.expand(len(self.counts), *mask.shape[1:]) if mask.dim() > 2 else mask
        cut = [own[..., at, :][..., at] for own, at in zip(by_picture, self.rows)] if mask.dim() > 2 else [
            mask[at][:, at] for at in self.rows
        ]  # fmt: skip
        return torch.stack(cut)

    def _rows_of(self, value: Tensor) -> Tensor:
        """Cut the first dimension of T rows behind that of pictures, if there is one."""
        shape, pictures = value.shape, len(self.counts)
        if not pictures:
            return value.index_select(shape.index(self.length), self.rows)
        if shape[0] in (1, pictures) and self.length in shape[1:]:
            axis = 1 + shape[1:].index(self.length)
            batch = value.expand(pictures, *shape[1:]).movedim(axis, 1)
            return batch[torch.arange(pictures, device=self.rows.device)[:, None], self.rows].movedim(1, axis)
        own = value.index_select(shape.index(self.length), self.rows.flatten())
        if shape[0] != self.length or pictures == 1:
            return own
        return own.unflatten(0, (pictures, 1, -1))  # [M, 1, k, ..]: a rotation that all heads of a picture share

    def with_filling(self, mask: Tensor | None, states: Tensor, flash: bool) -> Tensor | None:
        """A mask for rows that are filled up.

        Args:
            mask: what the block is given, cut; None if it is given none.
            states: `[M, k, D]`, for dtype and device.
            flash: whether attention takes `[M, k]` masks.
        """
        if not self.filled_up:
            return mask
        longest = self.rows.shape[1]
        real = (torch.arange(longest)[None] < torch.tensor(self.counts)[:, None]).to(states.device)  # [M, k]
        if flash or (mask is not None and mask.dim() == 2):
            return real if mask is None else real & mask.bool()
        if mask is None:
            mask = states.new_zeros(len(real), 1, longest, longest)
        hidden = ~real[:, None, None]
        low = torch.finfo(mask.dtype).min if mask.is_floating_point() else False
        return mask.masked_fill(hidden, low)
