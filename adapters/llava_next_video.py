"""LLaVA-NeXT-Video: pictures as in LLaVA-NeXT, and videos whose frames are pooled to a quarter of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenprune.adapters._anyres import AnyRes, pooled_video
from tokenprune.interfaces.visual import Visual
from tokenprune.registry import register_model


@register_model("llava_next_video")
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
