"""Averages the visual tokens over the cells of a smaller raster of at most k cells: the control for merging methods.

Paper: none, this is the mandatory control. UniPruneBench (https://arxiv.org/abs/2511.02650) has it in its code for 4,
16 and 25 tokens only.
Official code: none.
Licence: none needed, written for this library.
Deviations: any budget is allowed. The tokens that stay form a raster, so their number is the largest raster that fits
the budget and keeps the image's shape (`fit_grid`), which may be a few tokens less than k. With `key_bias` a mean
weighs as many tokens as its cell has, those that it shares with neighbours counted in each (our choice).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import adaptive_avg_pool2d

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, fit_grid, grid_places
from tokenprune.interfaces.view import View
from tokenprune.interfaces.visual import Raster
from tokenprune.registry import register_method


@register_method("pool")
@dataclass
class Pool(Pruner):
    """Replaces the `[N, D]` tokens of an image by means over the cells of a raster of rows * cols <= k.

    Means are taken in fp32. Where the raster does not divide the image's, neighbouring cells share tokens, as in
    PyTorch's adaptive average pooling. Each mean stands at the place nearest its cell's centre, whose position id it
    gets with `positions="keep"`. It has no options of its own.
    """

    merges: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True
    published: ClassVar[str] = "control, no paper"

    def exact_tokens(self, rasters: Sequence[Raster], budget: int) -> int:
        rows, cols = fit_grid(rasters[0].grid, budget)
        return rows * cols

    def select(self, view: View) -> Selection:
        small = fit_grid(view.grid, view.budget)
        raster = view.features.float().unflatten(1, view.grid).permute(0, 3, 1, 2)  # [M, D, rows, cols]
        pooled = adaptive_avg_pool2d(raster, small).flatten(2).transpose(1, 2)  # [M, k, D]
        images, device = view.num_images, view.features.device
        places = torch.tensor(grid_places(view.grid, small), device=device).expand(images, -1).contiguous()
        high, wide = (_bins(long, short) for long, short in zip(view.grid, small))
        sizes = torch.tensor([float(rows * cols) for rows in high for cols in wide], device=device)
        merged = torch.full((images,), view.num_tokens - len(sizes), device=device)
        return Selection(places, pooled.to(view.features.dtype), sizes=sizes.expand(images, -1), merged=merged)


def _bins(long: int, short: int) -> list[int]:
    """How many of `long` places each of the `short` cells of adaptive average pooling takes in."""
    return [-(-(cell + 1) * long // short) - cell * long // short for cell in range(short)]
