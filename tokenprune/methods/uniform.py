"""Keeps k visual tokens spread evenly over the image's raster, exactly k for every k: the content-blind control.

Paper: none, this is the mandatory control. VTC-Bench (https://arxiv.org/abs/2510.07143) shows how strong its nearest
relative is, a smaller image.
Official code: none.
Licence: none needed, written for this library.
Deviations: the usual control takes every s-th token of the raster sequence, which draws vertical stripes wherever s
divides the width; ours spreads in two dimensions (our choice).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection
from tokenprune.interfaces.view import View
from tokenprune.methods._places import spread
from tokenprune.registry import register_method


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
