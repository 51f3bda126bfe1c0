"""HunYuan-VL: every row of a picture ends in a token of its own, two stand around it, and positions have four parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters._generic import Generic
from tokenprune.interfaces.visual import Raster, Visual
from tokenprune.registry import register_model


@register_model("hunyuan_vl")
class HunYuanVL(Generic):
    """Stock `HunYuanVLForConditionalGeneration`."""

    classes = ("HunYuanVLForConditionalGeneration",)

    def visuals_behind(self, kind: str, call: Mapping[str, Any], output: Any) -> list[Visual]:
        merge, found = self.model.config.vision_config.spatial_merge_size, []
        for _, high, wide in call["image_grid_thw"].tolist():
            rows, cols = high // merge, wide // merge
            offsets = (1 + torch.arange(rows)[:, None] * (cols + 1) + torch.arange(cols)).flatten()
            found.append(Visual((Raster((rows, cols)),), placeholders=rows * (cols + 1) + 2, offsets=offsets))
        return found

    def position_ids(self, positions: Tensor) -> Tensor:
        return positions.expand(4, *positions.shape)
