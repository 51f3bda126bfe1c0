"""LFM2-VL: the tiles of a picture and its thumbnail between two ids, a label in front of each."""

from __future__ import annotations

from tokenprune.adapters._tiles import FramedPrompts
from tokenprune.registry import register_model


@register_model("lfm2_vl")
class Lfm2VL(FramedPrompts):
    """Stock `Lfm2VlForConditionalGeneration`."""

    classes = ("Lfm2VlForConditionalGeneration",)
