"""Aya Vision and Command A Vision: the tiles of a picture between two ids, with a label or a line end to each."""

from __future__ import annotations

from tokenprune.adapters._tiles import FramedPrompts
from tokenprune.registry import register_model


@register_model("aya_vision")
class AyaVision(FramedPrompts):
    """Stock `AyaVisionForConditionalGeneration` and `Cohere2VisionForConditionalGeneration`."""

    classes = ("AyaVisionForConditionalGeneration", "Cohere2VisionForConditionalGeneration")
