"""Emu3: a picture is words of a codebook, and each of its rows ends in a token of its own, at a placeholder too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tokenprune.adapters._generic import Generic
from tokenprune.interfaces.visual import Raster, Visual
from tokenprune.registry import register_model


@register_model("emu3")
class Emu3(Generic):
    """Stock `Emu3ForConditionalGeneration`; row ends stay while their picture is whole, as separators do."""

    classes = ("Emu3ForConditionalGeneration",)

    def visuals_behind(self, kind: str, call: Mapping[str, Any], output: Any) -> list[Visual]:
        side, found = self.entry.vqmodel.vision_spatial_factor, []
        for high, wide in call["image_sizes"].tolist():
            rows, cols = high // side, wide // side
            offsets = (torch.arange(rows)[:, None] * (cols + 1) + torch.arange(cols)).flatten()
            found.append(Visual((Raster((rows, cols)),), placeholders=rows * (cols + 1), offsets=offsets))
        return found
