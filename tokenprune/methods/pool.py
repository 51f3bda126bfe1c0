"""Averages the visual tokens over the cells of a smaller raster of at most k cells: the control for merging methods.

Paper: none, this is the mandatory control. UniPruneBench (https://arxiv.org/abs/2511.02650) has it in its code for 4,
16 and 25 tokens only.
Official code: none.
Licence: none needed, written for this library.
Deviations: any budget is allowed. The tokens that stay form a raster, so their number is the largest raster that fits
the budget and keeps the image's shape (`fit_grid`), which may be a few tokens less than k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import adaptive_avg_pool2d

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, fit_grid, grid_places
from tokenprune.interfaces.view import View
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

    def select(self, view: View) -> Selection:
        small = fit_grid(view.grid, view.budget)
        raster = view.features.float().unflatten(1, view.grid).permute(0, 3, 1, 2)  # [M, D, rows, cols]
        pooled = adaptive_avg_pool2d(raster, small).flatten(2).transpose(1, 2)  # [M, k, D]
        places = torch.tensor(grid_places(view.grid, small), device=view.features.device)
        return Selection(places.expand(view.num_images, -1).contiguous(), pooled.to(view.features.dtype))
