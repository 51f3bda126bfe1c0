"""What was recorded of images while the vision tower ran, and how features find it again.

`generate` may run the tower before the forward pass and repeat its features for beams, so a recording is tied to the
feature tensors themselves rather than to a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenprune.signals import Signal

_TAG = "_tokenprune_source"


class Recording:
    """One run of the vision tower over M images.

    Attributes:
        signals: recorded values, each `[M, N]`.
        grids: (rows, cols) of each image's tokens in the prompt.
        kept: places that a "pixels" method filled, the same in each image, or None.
        tower_grid: (rows, cols) that the tower really worked on, if a method shrank the pictures.
    """

    def __init__(self, pixel_values: Tensor, grids: list[tuple[int, int]]) -> None:
        self.signals: dict[Signal, Tensor] = {}
        self.grids = grids
        self.kept: list[int] | None = None
        self.tower_grid: tuple[int, int] | None = None
        self.device = pixel_values.device
        self._pixels = pixel_values

    def pixel_keys(self) -> Tensor:
        """`[M]` int64: a sum over the bits of each image's pixels, the same in any batch and on any device."""
        pixels = self._pixels.detach().float().contiguous()
        bits = pixels.view(torch.int32).flatten(1).to(torch.int64)
        # weights by place, so that a shifted picture has another key; int64 overflow wraps the same way everywhere
        weights = torch.arange(1, bits.shape[1] + 1, device=bits.device) * 2654435761
        return (bits * weights).sum(1)


def tag(features: Any, recording: Recording) -> None:
    """Tie each image's feature tensor to its row of `recording`."""
    for row, tensor in enumerate(features):
        setattr(tensor, _TAG, (recording, row))


def source(tensor: Any) -> tuple[Recording, int] | None:
    """The recording and row that a feature tensor came from."""
    return getattr(tensor, _TAG, None)


def gather_rows(sources: list[tuple[Recording, int]], read: Callable[[Recording], Tensor]) -> Tensor:
    """`read(recording)[row]` of each source, stacked; one indexing when all come from one recording in order."""
    first = sources[0][0]
    if all(recording is first for recording, _ in sources):
        value = read(first)
        rows = [row for _, row in sources]
        return value if rows == list(range(value.shape[0])) else value[rows]
    return torch.stack([read(recording)[row] for recording, row in sources])
