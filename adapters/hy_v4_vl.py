"""HY V4 VL: every row of a picture, and of each frame of a video, ends in a token of its own, at a placeholder too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tokenprune.adapters._generic import Generic
from tokenprune.interfaces.visual import Raster, Visual
from tokenprune.registry import register_model


@register_model("hy_v4_vl")
class HyV4VL(Generic):
    """Stock `HYV4VLForConditionalGeneration`; row ends stay while their picture is whole, as separators do."""

    classes = ("HYV4VLForConditionalGeneration",)

    def visuals_behind(self, kind: str, call: Mapping[str, Any], output: Any) -> list[Visual]:
        merge, found = self.model.config.vision_config.spatial_merge_size, []
        for frames, high, wide in call[f"{kind}_grid_thw"].tolist():
            rows, cols = high // merge, wide // merge
            offsets = (torch.arange(frames * rows)[:, None] * (cols + 1) + torch.arange(cols)).flatten()
            name = "frame" if kind == "video" else "image"
            rasters = tuple(Raster((rows, cols), frame * rows * cols, name) for frame in range(frames))
            count = frames * rows * (cols + 1)
            found.append(Visual(rasters, kind, count, offsets, scattered=kind == "video"))
        return found
