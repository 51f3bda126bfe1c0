"""ERNIE 4.5 VL: some experts are for text and some for pictures, and each layer is told what stands at a place."""

from __future__ import annotations

from tokenprune.adapters._generic import Generic
from tokenprune.registry import register_model


@register_model("ernie4_5_vl_moe")
class Ernie(Generic):
    """Stock `Ernie4_5_VLMoeForConditionalGeneration`."""

    classes = ("Ernie4_5_VLMoeForConditionalGeneration",)
    decoder_by_place = ("moe_mm_token_type_ids",)
    layer_by_place = ("moe_mm_token_type_ids",)
