"""Gemma 4 Unified: pictures without a tower, and Gemma 4's decoder without embeddings beside the rows."""

from __future__ import annotations

from tokenprune.adapters._cost import without_decoder
from tokenprune.adapters._generic import Generic
from tokenprune.cost import ModelShape
from tokenprune.registry import register_model


@register_model("gemma4_unified")
class Gemma4Unified(Generic):
    """Stock `Gemma4UnifiedForConditionalGeneration`."""

    classes = ("Gemma4UnifiedForConditionalGeneration",)

    def cost_shape(self) -> ModelShape:
        """Its decoder is not modelled: where tokens left, logits are computed at all places that stay, else at the last
        alone."""
        return without_decoder(super().cost_shape())
