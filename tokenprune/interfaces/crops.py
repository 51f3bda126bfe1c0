"""Pictures that a tower gets in crops: which tokens are made of them, read off the function that packs them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenprune.interfaces.visual import Raster, Visual

Pack = Callable[[Tensor, Tensor], Tensor]


def anyres_visual(pack: Pack, crops: int, side: int) -> Visual:
    """The layout of one picture, read off the model's packing function, which is called on cell numbers, not features.

    Args:
        pack: (values `[crops, side * side, 1]`, newline `[1]`) -> `[P, 1]`: what the model makes of a picture's crops.
        crops: pictures that the tower gets of it.
        side: patches along a side of each.
    """
    cells = crops * side * side
    numbers = torch.arange(cells, dtype=torch.float64).view(crops, side * side, 1)
    packed = pack(numbers, torch.tensor([-1.0], dtype=torch.float64))[:, 0]  # [placeholders], -1 at separators
    offsets = (packed >= 0).nonzero()[:, 0]  # [N]
    sources = packed[offsets]  # [N]
    count = offsets.shape[0]
    rows = packed.shape[0] - count
    if crops == 1 or rows == 0:  # of an extreme strip all rows of the mosaic are padding
        rasters = (Raster((side, side)),)
    else:
        mosaic = (rows, (count - side * side) // rows)
        rasters = (Raster((side, side), 0, "thumbnail"), Raster(mosaic, side * side, "mosaic"))

    def resample(values: Tensor) -> Tensor:
        cells = values.view(crops, side * side, -1)
        by_token = pack(cells, values.new_zeros(cells.shape[-1]))[offsets.to(values.device)]  # [N, C]
        return by_token[:, 0] if values.dim() == 1 else by_token

    one_cell_each = bool((sources == sources.round()).all()) and sources.unique().shape[0] == count
    return Visual(
        rasters,
        placeholders=packed.shape[0],
        offsets=offsets,
        crops=((side, side),) * crops,
        sources=sources.long() if one_cell_each else None,
        resample=None if one_cell_each else resample,
    )
