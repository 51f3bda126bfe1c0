"""Llama 4: the model projects features after the call that makes them, and its layers see chunks of the row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenprune.adapters._generic import Generic
from tokenprune.registry import register_model


@register_model("llama4")
class Llama4(Generic):
    """Stock `Llama4ForConditionalGeneration`."""

    classes = ("Llama4ForConditionalGeneration",)
    features_at_places = False

    def feature_rows(self, output: Any) -> list[Tensor]:
        return list(output.last_hidden_state)
