"""Pictures in crops: a thumbnail, and a mosaic of tiles without its padding and with a separator after each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokenprune.interfaces.visual import Raster, Visual

Pack = Callable[[Tensor, Tensor], Tensor]


def anyres_visual(pack: Pack, crops: int, side: int) -> Visual:
    """The layout of one picture, read off the model's own packing: it is given numbers in place of features.

    Args:
        pack: (values `[crops, side * side, 1]`, newline `[1]`) -> `[P, 1]`: what the model makes of a picture's crops.
        crops: pictures that the tower gets of it.
        side: patches along a side of each.
    """
    cells = crops * side * side
    numbers = torch.arange(cells, dtype=torch.float64).view(crops, side * side, 1)
    packed = pack(numbers, torch.tensor([-1.0], dtype=torch.float64))[:, 0]
    offsets = (packed >= 0).nonzero()[:, 0]
    found = packed[offsets]
    count = offsets.shape[0]
    rows = packed.shape[0] - count
    if crops == 1 or rows == 0:  # of an extreme strip all rows of the mosaic are padding
        rasters = (Raster((side, side)),)
    else:
        mosaic = (rows, (count - side * side) // rows)
        rasters = (Raster((side, side), 0, "thumbnail"), Raster(mosaic, side * side, "mosaic"))

    def resample(values: Tensor) -> Tensor:
        own = pack(values.view(crops, side * side, 1), values.new_zeros(1))[:, 0]
        return own[offsets.to(own.device)]

    whole = bool((found == found.round()).all()) and found.unique().shape[0] == count
    return Visual(
        rasters,
        placeholders=packed.shape[0],
        offsets=offsets,
        crops=((side, side),) * crops,
        sources=found.long() if whole else None,
        resample=None if whole else resample,
    )


def split_crops(pixels: Tensor, visuals: Sequence[Visual]) -> list[Tensor]:
    """The crops of each picture, from `[images, most crops, C, H, W]` or `[all crops, C, H, W]`."""
    crops = [len(visual.tower_grids) for visual in visuals]
    if pixels.dim() == 5:
        return [own[:count] for own, count in zip(pixels, crops)]
    return list(pixels.split(crops))
