"""Apertus 1.5: a picture is words of a codebook, one for each cell of its own size, its rows written apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenprune.adapters._generic import Generic
from tokenprune.interfaces.visual import Raster, Visual
from tokenprune.registry import register_model


@register_model("apertus1p5")
class Apertus1p5(Generic):
    """Stock `Apertus1p5ForConditionalGeneration`; its processor writes an end of line between the rows of a picture."""

    classes = ("Apertus1p5ForConditionalGeneration",)

    def visuals_behind(self, kind: str, call: Mapping[str, Any], output: Any) -> list[Visual]:
        side = self.model.config.vision_config.spatial_scale_factor
        grids = [(high // side, wide // side) for high, wide in call["image_sizes"].tolist()]
        return [Visual((Raster(grid),), scattered=True) for grid in grids]
