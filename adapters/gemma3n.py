"""Gemma 3n: each decoder layer is handed an embedding of the token at a place beside the row, as in Gemma 4.

Its layers hold several states of each token, `[states, B, S, D]`, so tokens can leave in front of them only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenprune.adapters._cost import without_decoder
from tokenprune.adapters._generic import Generic
from tokenprune.adapters._grids import visuals_by_map
from tokenprune.cost import ModelShape
from tokenprune.interfaces.visual import Visual
from tokenprune.registry import register_model


@register_model("gemma3n")
class Gemma3n(Generic):
    """Stock `Gemma3nForConditionalGeneration`."""

    classes = ("Gemma3nForConditionalGeneration",)
    decoder_by_place = ("per_layer_inputs",)

    def visuals_behind(self, kind: str, call: Mapping[str, Any], output: Any) -> list[Visual]:
        return visuals_by_map(output.last_hidden_state, [len(own) for own in self.feature_rows(output)])

    def cost_shape(self) -> ModelShape:
        """Its decoder is not modelled: embeddings of places are made for all of a prompt, whatever left."""
        return without_decoder(super().cost_shape())
