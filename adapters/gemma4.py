"""Gemma 4: each decoder layer is handed an embedding of the token at a place beside the row, and adds it."""

from __future__ import annotations

from tokenprune.adapters._cost import without_decoder
from tokenprune.adapters._generic import Generic
from tokenprune.cost import ModelShape
from tokenprune.registry import register_model


@register_model("gemma4")
class Gemma4(Generic):
    """Stock `Gemma4ForConditionalGeneration`."""

    classes = ("Gemma4ForConditionalGeneration",)
    decoder_by_place = ("per_layer_inputs",)
    layer_by_place = ("per_layer_input",)
    verified = True  # its decoder cannot be tried on random embeddings, which are those of no token

    def cost_shape(self) -> ModelShape:
        """Its decoder is not modelled: embeddings of places are projected for all of a prompt, whatever left."""
        return without_decoder(super().cost_shape())
