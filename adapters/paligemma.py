"""PaliGemma: all of a prompt, text and pictures, sees itself in both directions; what is answered does not."""

from __future__ import annotations

from tokenprune.adapters._generic import Generic
from tokenprune.registry import register_model


@register_model("paligemma")
class PaliGemma(Generic):
    """Stock `PaliGemmaForConditionalGeneration`, PaliGemma 2 among its models."""

    classes = ("PaliGemmaForConditionalGeneration",)
    prefix_type = 0
