"""Video-LLaVA: a tower for pictures and one for videos, whose frames go into the decoder with their [CLS] tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tokenprune.adapters._generic import Generic
from tokenprune.interfaces.visual import Raster, Visual
from tokenprune.registry import register_model


@register_model("video_llava")
class VideoLlava(Generic):
    """Stock `VideoLlavaForConditionalGeneration`; a frame's [CLS] stays while its video is whole, as separators do."""

    classes = ("VideoLlavaForConditionalGeneration",)

    def visuals_behind(self, kind: str, call: Mapping[str, Any], output: Any) -> list[Visual]:
        if kind == "image":
            return super().visuals_behind(kind, call, output)
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        videos, frames = call["pixel_values_videos"].shape[:2]
        cells = torch.arange(side**2)
        offsets = (torch.arange(frames)[:, None] * (side**2 + 1) + 1 + cells).flatten()
        rasters = tuple(Raster((side, side), frame * side**2, "frame") for frame in range(frames))
        return [Visual(rasters, "video", frames * (side**2 + 1), offsets)] * videos
