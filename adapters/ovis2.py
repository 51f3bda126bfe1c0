"""Ovis 2: the tiles of a picture between two ids, with one between them that says where the next stands."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenprune.adapters._generic import Generic
from tokenprune.adapters._tiles import pictures_by_frame
from tokenprune.interfaces.visual import Pictures
from tokenprune.registry import register_model


@register_model("ovis2")
class Ovis2(Generic):
    """Stock `Ovis2ForConditionalGeneration`."""

    classes = ("Ovis2ForConditionalGeneration",)

    def pictures(self, kind: str, ids: Tensor | None, places: Sequence[Tensor]) -> Pictures:
        return pictures_by_frame(ids, places)
