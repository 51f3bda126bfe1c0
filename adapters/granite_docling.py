"""Granite Docling: tiles with labels between them, as Idefics 3 writes them, a coarse or a fine grid of tokens a tile.

A picture of one tile is written without the separator behind it that others have, so a prompt of several pictures with
such a one among them counts as one picture, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenprune.adapters._tiles import TiledPrompts, pictures_by_label
from tokenprune.interfaces.visual import Pictures, Raster
from tokenprune.registry import register_model


@register_model("granite_docling")
class GraniteDocling(TiledPrompts):
    """Stock `GraniteDoclingForConditionalGeneration`."""

    classes = ("GraniteDoclingForConditionalGeneration",)

    def tile_raster(self, call: Mapping[str, Any]) -> Raster:
        side = round(int(self.entry.image_seq_len) ** 0.5)
        if call.get("tile_fine_mask") is not None:
            side *= 2
        return Raster((side, side), 0, "crop")

    def pictures(self, kind: str, ids: Tensor | None, places: Sequence[Tensor]) -> Pictures:
        return pictures_by_label(ids, places)
