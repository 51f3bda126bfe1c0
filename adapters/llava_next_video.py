"""LLaVA-NeXT-Video: pictures as in LLaVA-NeXT, and videos whose frames are pooled to a quarter of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters.llava_next import AnyRes
from tokenprune.interfaces.visual import Raster, Visual
from tokenprune.registry import MODELS


def pooled_video(frames: int, side: int, pool: Any, separators: int = 0, before_projector: bool = False) -> Visual:
    """A video of `frames` frames, each `side` x `side` in the tower, by the model's own pooling.

    Args:
        pool: `[frames, side * side, 1]` -> `[frames, n, 1]`.
        separators: placeholders behind the last frame.
        before_projector: whether the projector gets what was pooled.
    """
    count = pool(torch.zeros(1, side * side, 1)).shape[1]
    small = round(count**0.5)
    rasters = tuple(Raster((small, small), frame * count, "frame") for frame in range(frames))

    def resample(values: Tensor) -> Tensor:
        return pool(values.view(frames, side * side, 1)).reshape(-1)

    return Visual(
        rasters,
        kind="video",
        placeholders=frames * count + separators,
        offsets=torch.arange(frames * count) if separators else None,
        crops=((side, side),) * frames,
        resample=resample,
        projected=frames * count if before_projector else None,
    )


@MODELS.register("llava_next_video")
class LlavaNextVideo(AnyRes):
    """Stock `LlavaNextVideoForConditionalGeneration` with a CLIP vision tower."""

    classes = ("LlavaNextVideoForConditionalGeneration",)
    features = {"image": "get_image_features", "video": "get_video_features"}

    def visuals(self, kind: str, call: Mapping[str, Any]) -> list[Visual]:
        if kind == "image":
            return super().visuals(kind, call)
        videos, frames = call["pixel_values_videos"].shape[:2]
        pool = self.entry.vision_resampler
        return [pooled_video(frames, self._side, pool, before_projector=True)] * videos

    def pixel_rows(self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        return list(call["pixel_values_videos"]) if kind == "video" else super().pixel_rows(kind, call, visuals)
