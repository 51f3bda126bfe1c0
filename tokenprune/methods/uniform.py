"""Keeps k visual tokens spread evenly over the image's raster, exactly k for every k: the content-blind control.

Paper: none, this is the mandatory control. VTC-Bench (https://arxiv.org/abs/2510.07143) shows how strong its nearest
relative is, a smaller image.
Official code: none.
Licence: none needed, written for this library.
Deviations: the usual control takes every s-th token of the raster sequence, which draws vertical stripes wherever s
divides the width; ours spreads in two dimensions (our choice).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection
from tokenprune.interfaces.view import View
from tokenprune.registry import register_method


def spread(grid: tuple[int, int], k: int, device: torch.device | str = "cpu") -> Tensor:
    """k places spread evenly over a raster, centred, as sorted unique raster indices.

    The number of rows is the one that makes cells square, sqrt(k * rows / cols), as near as k allows. The k places are
    dealt to them as evenly as integers can be, and stand at the centres of equal parts of their row.

    Args:
        grid: (rows, cols) of the raster.
        k: how many places, 1 <= k <= rows * cols.
        device: where the result lives.

    Returns:
        `[k]` int64, strictly increasing.

    Raises:
        ValueError: k is out of range.
    """
    height, width = grid
    if not 1 <= k <= height * width:
        raise ValueError(f"A raster of {height} x {width} has no {k} different places.")
    rows = round(math.sqrt(k * height / width))
    rows = min(max(rows, -(-k // width)), height, k)
    # place t is number j of the `count` places of row i; row i owns the places from i * k // rows on
    t = torch.arange(k, device=device)
    i = ((t + 1) * rows - 1) // k
    start = i * k // rows
    count = (i + 1) * k // rows - start
    row = (2 * i + 1) * height // (2 * rows)
    column = (2 * (t - start) + 1) * width // (2 * count)
    return row * width + column


@register_method("uniform")
@dataclass
class Uniform(Pruner):
    """Keeps the same k places in every image, spread over the raster `grid` as evenly as integers allow.

    It has no options of its own; see `spread` for the places it takes.
    """

    needs_grid: ClassVar[bool] = True
    published: ClassVar[str] = "control, no paper"

    def select(self, view: View) -> Selection:
        places = spread(view.grid, view.budget, view.features.device)
        return Selection(places.expand(view.num_images, -1).contiguous())
