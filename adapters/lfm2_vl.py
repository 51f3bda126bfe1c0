"""LFM2-VL: the tiles of a picture and its thumbnail between two ids, a label in front of each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenprune.adapters._generic import Generic
from tokenprune.adapters._tiles import pictures_by_frame
from tokenprune.interfaces.visual import Pictures
from tokenprune.registry import register_model


@register_model("lfm2_vl")
class Lfm2VL(Generic):
    """Stock `Lfm2VlForConditionalGeneration`."""

    classes = ("Lfm2VlForConditionalGeneration",)

    def pictures(self, kind: str, ids: Tensor | None, places: Sequence[Tensor]) -> Pictures:
        return pictures_by_frame(ids, places)
