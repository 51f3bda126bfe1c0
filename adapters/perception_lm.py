"""Perception LM: each picture is a thumbnail and tiles, all pictures of a call as many, in one run of placeholders.

The projector pools a square of patches into each token.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenprune.adapters._generic import Generic
from tokenprune.adapters._tiles import UNTOLD, pictures_by_run
from tokenprune.interfaces.visual import Pictures, Raster, Visual, unplaced
from tokenprune.registry import register_model


@register_model("perception_lm")
class PerceptionLM(Generic):
    """Stock `PerceptionLMForConditionalGeneration`; frames of a video come as the tiles of a picture do."""

    classes = ("PerceptionLMForConditionalGeneration",)

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._tiles: dict[tuple[int, str], int] = {}  # of each picture of the last call, by thread and kind

    def visuals_behind(self, kind: str, call: Mapping[str, Any], output: Any) -> list[Visual]:
        self._tiles[threading.get_ident(), kind] = call[self.pixels[kind]].shape[1]
        found = []
        for rows in self.feature_rows(output):
            side = math.isqrt(len(rows))
            square = Visual((Raster((side, side)),), kind=kind)
            found.append(square if side * side == len(rows) else unplaced(len(rows), kind))
        return found

    def pictures(self, kind: str, ids: Tensor | None, places: Sequence[Tensor]) -> Pictures:
        tiles = self._tiles.get((threading.get_ident(), kind), 1)
        if any(run % tiles for run in pictures_by_run(places).counts):
            return Pictures((len(places),), UNTOLD)
        return Pictures((tiles,) * (len(places) // tiles))  # pictures side by side are one run

    def pixel_rows(self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        return list(call[self.pixels[kind]].flatten(0, 1))
