"""FastVLM: a tower of convolutions from timm, whose map is the grid of a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenprune.adapters._generic import Generic
from tokenprune.adapters._grids import visuals_by_map
from tokenprune.interfaces.visual import Visual
from tokenprune.registry import register_model


@register_model("fast_vlm")
class FastVlm(Generic):
    """Stock `FastVlmForConditionalGeneration`."""

    classes = ("FastVlmForConditionalGeneration",)

    def visuals_behind(self, kind: str, call: Mapping[str, Any], output: Any) -> list[Visual]:
        return visuals_by_map(output.last_hidden_state, [len(own) for own in self.feature_rows(output)])
