"""Qwen2.5-VL: as Qwen2-VL, with windowed attention in most blocks of the tower, whose rows are sorted by windows."""

from __future__ import annotations

from tokenprune.adapters._qwen import QwenVL
from tokenprune.registry import register_model


@register_model("qwen2_5_vl")
class Qwen25VL(QwenVL):
    """Stock `Qwen2_5_VLForConditionalGeneration`."""

    classes = ("Qwen2_5_VLForConditionalGeneration",)
    gated_tower = True
