"""Moving what stays: embeddings, positions and mask of a ragged batch, all by one index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.kernels.compact_rows import compact_rows


@dataclass(frozen=True)
class Compaction:
    """A plan to shorten `[B, S]` rows to `[B, P]`.

    Attributes:
        index: `[B, P]` int64, where each new place comes from. Padding on the left comes from place 0, padding on the
            right from the last place: `generate` reads the last column of a row even where it is padding, and so it
            reads what the full-length row has there.
        real: `[B, P]` bool, False at padding.
        removed_before: `[B, P]` int64, visual tokens that left the row before this place.
        removed: `[B]` int64, visual tokens that left the row.
        padded: whether any place is padding.
        target: `[B, S]` int64, where each place goes; of no meaning at places that leave.
    """

    index: Tensor
    real: Tensor
    removed_before: Tensor
    removed: Tensor
    padded: bool
    target: Tensor

    def rows(self, values: Tensor) -> Tensor:
        """Move `[B, S, ...]` to `[B, P, ...]`."""
        return self.move([values])[0]

    def move(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Move several `[B, S, ...]` on one device to `[B, P, ...]`, on a GPU in one launch."""
        return compact_rows(self.index.to(values[0].device), values) if values else []

    def after(self, earlier: Compaction | None) -> Compaction:
        """This move and the one before it as one."""
        if earlier is None:
            return self
        index = self.rows(earlier.index)  # [B, P]
        removed_before = self.removed_before + self.rows(earlier.removed_before)
        real = self.real & self.rows(earlier.real)
        target = self.target.gather(1, earlier.target.clamp(0, self.target.shape[1] - 1))
        removed = self.removed + earlier.removed
        return Compaction(index, real, removed_before, removed, self.padded, target)

    def stays(self) -> Tensor:
        """`[B, S]` bool: places whose tokens are in the shortened rows, padding not among them."""
        count = torch.zeros(self.target.shape, dtype=torch.int64, device=self.index.device)
        return count.scatter_add(1, self.index, self.real.to(torch.int64)) > 0

    def standing(self) -> Tensor:
        """`[B, S]` int64: for each full-length place, the shortened place that stands for it.

        A token that stays is there itself; one that left, the last before it that stayed. Padding on the left is there
        as the first column, padding on the right as the last one, where the rows kept any.
        """
        length = self.index.shape[1]
        places = torch.where(self.stays(), self.target, 0).cummax(dim=1).values  # [B, S]
        last = torch.where(self.real, self.index, -1).amax(dim=1, keepdim=True)  # [B, 1]
        behind = torch.arange(places.shape[1], device=places.device) > last
        return places.masked_fill(behind & ~self.real[:, -1:], length - 1)

    def restore(self, values: Tensor) -> Tensor:
        """Move `[B, P, ...]` back to `[B, S, ...]`, see `standing`."""
        places = self.standing().to(values.device)
        return values[torch.arange(places.shape[0], device=values.device)[:, None], places]

    def counted(self) -> Tensor:
        """`[B, S]` bool: places that a loss counts. Not tokens that left, nor padding, nor the first token of a row:
        what stands before it is padding, or left, and predicts nothing."""
        stays = self.stays()
        return stays & (stays.cumsum(1) > 1)

    def positions(self, position_ids: Tensor, policy: str) -> Tensor:
        """Move position ids `[..., B, S]` to `[..., B, P]`.

        policy "keep" leaves each token the id it had; "compact" closes the gaps: each id shrinks by the visual tokens
        that left before it.
        """
        index = self.index.to(position_ids.device).expand(*position_ids.shape[:-2], *self.index.shape)
        moved = position_ids.expand(*position_ids.shape[:-2], self.index.shape[0], -1).gather(-1, index)
        return moved - self.removed_before.to(moved.device) if policy == "compact" else moved


def plan_compaction(
    keep: Tensor, attended: Tensor | None, lengths: list[int], pad_left: bool, tails: list[int] | None = None
) -> Compaction:
    """Plan the move of the kept, unpadded tokens of each row to one end of a shorter row.

    Args:
        keep: `[B, S]` bool, False at visual tokens that leave.
        attended: `[B, S]` bool, False at padding; None means no padding.
        lengths: for each row, the count of places that are kept and attended (known on the host, so that the new
            length needs no read from the device).
        pad_left: put the padding of the shortened rows on the left.
        tails: for each row, how many places of padding it must keep at its right end: 1 where the full row ends in
            padding, because `generate` reads the last column, whatever it is.
    """
    batch_size, _ = keep.shape
    length = max(count + tail for count, tail in zip(lengths, tails or [0] * batch_size))
    stays = keep if attended is None else keep & attended  # [B, S]
    place = stays.cumsum(1) - 1  # [B, S]
    if pad_left:
        place = place + (length - torch.tensor(lengths, device=keep.device))[:, None]
    source = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    # everything that leaves is written to a spare last column
    target = torch.where(stays, place, length)  # [B, S]
    index = torch.full((batch_size, length + 1), -1, dtype=torch.int64, device=keep.device)
    index = index.scatter(1, target, source)[:, :length]  # [B, P]
    real = index >= 0
    index = index.masked_fill(~real, 0 if pad_left else keep.shape[1] - 1)
    left = (~keep).cumsum(1)  # [B, S]
    padded = any(row != length for row in lengths)
    return Compaction(index, real, left.gather(1, index), left[:, -1], padded, place)
