"""Qwen2-VL: dynamic resolution, a tower with full attention within each frame, 2 x 2 merger, M-RoPE."""

from __future__ import annotations

from tokenprune.adapters._qwen import QwenVL
from tokenprune.registry import register_model


@register_model("qwen2_vl")
class Qwen2VL(QwenVL):
    """Stock `Qwen2VLForConditionalGeneration`."""

    classes = ("Qwen2VLForConditionalGeneration",)
