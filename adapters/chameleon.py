"""Chameleon: a picture is a map of words of a codebook, and the decoder merges it into its rows by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenprune.adapters._generic import Generic
from tokenprune.adapters._grids import visuals_by_map
from tokenprune.interfaces.visual import Visual
from tokenprune.registry import register_model


@register_model("chameleon")
class Chameleon(Generic):
    """Stock `ChameleonForConditionalGeneration`."""

    classes = ("ChameleonForConditionalGeneration",)
    decoder_is_entry = True

    def visuals_behind(self, kind: str, call: Mapping[str, Any], output: Any) -> list[Visual]:
        lengths = [len(own) for own in self.feature_rows(output)]
        return visuals_by_map(output.quantized_last_hidden_state, lengths)

    def merged(self, call: Mapping[str, Any]) -> Tensor:
        embeds = self.entry.get_input_embeddings()(call["input_ids"])
        output = (call.get("mm_encoder_outputs") or {}).get("image")
        if output is None and call.get("pixel_values") is not None:
            output = self.entry.get_image_features(call["pixel_values"], return_dict=True)
        if output is None:
            return embeds
        features = output.pooler_output.to(embeds)
        places = self.entry.get_placeholder_mask(call["input_ids"], inputs_embeds=embeds, image_features=features)
        return embeds.masked_scatter(places, features)
