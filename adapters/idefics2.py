"""Idefics2: a perceiver makes a fixed number of latents of each picture, or of each crop of one; they stand in no grid.

Which crops make a picture is read off the prompt, where it says so (`_tiles.py`): the processor splits all pictures of
a call, each into four crops and the whole, or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenprune.adapters._tiles import TiledPrompts, pictures_by_chain
from tokenprune.interfaces.visual import Pictures, Raster
from tokenprune.registry import register_model

_CROPS = 5


@register_model("idefics2")
class Idefics2(TiledPrompts):
    """Stock `Idefics2ForConditionalGeneration`."""

    classes = ("Idefics2ForConditionalGeneration",)

    def tile_raster(self, call: Mapping[str, Any]) -> Raster:
        return Raster((1, self.model.config.perceiver_config.resampler_n_latents), 0, "unplaced")

    def pictures(self, kind: str, ids: Tensor | None, places: Sequence[Tensor]) -> Pictures:
        return pictures_by_chain(ids, places, _CROPS)
