"""Aya Vision and Command A Vision: the tiles of a picture between two ids, with a label or a line end to each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenprune.adapters._generic import Generic
from tokenprune.adapters._tiles import pictures_by_frame
from tokenprune.interfaces.visual import Pictures
from tokenprune.registry import register_model


@register_model("aya_vision")
class AyaVision(Generic):
    """Stock `AyaVisionForConditionalGeneration` and `Cohere2VisionForConditionalGeneration`."""

    classes = ("AyaVisionForConditionalGeneration", "Cohere2VisionForConditionalGeneration")

    def pictures(self, kind: str, ids: Tensor | None, places: Sequence[Tensor]) -> Pictures:
        return pictures_by_frame(ids, places)
