"""LLaVA-NeXT (1.6): a CLIP tower over a thumbnail and tiles, whose mosaic is unpadded and gets a token after each row.

A method ranks the thumbnail and the mosaic separately, with budgets in proportion, or jointly (its `scope`). The
row-end tokens leave with the first cut of their picture.
"""

from __future__ import annotations

from tokenprune.adapters._anyres import AnyRes
from tokenprune.registry import register_model


@register_model("llava_next")
class LlavaNext(AnyRes):
    """Stock `LlavaNextForConditionalGeneration` with a CLIP vision tower."""

    classes = ("LlavaNextForConditionalGeneration",)
