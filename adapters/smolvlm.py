"""SmolVLM and Idefics3: a SigLIP tower over tiles, s x s patches joined by pixel shuffle, text between the tiles.

The model gets the tiles of a prompt in one row. Which make a picture is read off the labels that its processor writes
in front of them (`_tiles.py`); they are the rasters of one visual. Frames of a video have no tiles and count as
pictures. A prompt with several tiles that is written otherwise counts as one picture, and the report says so. Signals
of the tower are means over the patches of a token, which leave it together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters._cost import read_off, text_sizes, vit_sizes
from tokenprune.adapters._tiles import Tile, pictures_by_label, tile_pixels
from tokenprune.adapters._vit import vit_facts
from tokenprune.adapters._vit_cells import CellVit
from tokenprune.cost import ModelShape
from tokenprune.interfaces.adapter import Adapter, submodule
from tokenprune.interfaces.visual import Pictures, Raster, Visual
from tokenprune.registry import register_model


@register_model("smolvlm")
class SmolVLM(Adapter):
    """Stock `SmolVLMForConditionalGeneration` and `Idefics3ForConditionalGeneration`."""

    classes = ("SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration")
    decoder_path = "model.text_model"
    projector_path = "model.connector"

    def __init__(self, model: Any) -> None:
        config = model.config
        vision = config.vision_config
        super().__init__(model)
        tower = submodule(model, "model.vision_model")
        patches = vision.image_size // vision.patch_size
        self._side = patches // config.scale_factor
        # the model's pixel shuffle, called on patch numbers, says which patches make a token
        numbers = torch.arange(patches**2, dtype=torch.float64).view(1, -1, 1)
        cells = submodule(model, "model.connector").pixel_shuffle(numbers, config.scale_factor)[0].long()  # type: ignore[operator]
        facts = vit_facts(vision, vision.num_hidden_layers - 1, has_cls=False)
        blocks = submodule(tower, "encoder.layers")
        self.vision = CellVit(tower, blocks, self.projector, facts, vision.patch_size, cells)

    def _tiles(self, call: Mapping[str, Any]) -> list[list[int]]:
        """(row, place) of each tile; the processor fills up with pictures of zeros, which the model leaves out."""
        real = (call["pixel_values"] != 0).flatten(2).any(dim=2).cpu()  # [B, most tiles]
        if not bool(real.any()):
            real[0, 0] = True
        return real.nonzero().tolist()

    def visuals(self, kind: str, call: Mapping[str, Any]) -> list[Visual]:
        raster = Raster((self._side, self._side), 0, "crop")
        return [Tile((raster,), scattered=True, row=row, place=place) for row, place in self._tiles(call)]

    def pictures(self, kind: str, ids: Tensor | None, places: Sequence[Tensor]) -> Pictures:
        return pictures_by_label(ids, places)

    def pixel_rows(self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        return tile_pixels(call["pixel_values"], visuals)

    def cost_shape(self) -> ModelShape:
        config = self.model.config
        vision, text = config.vision_config, config.get_text_config()
        patches = (vision.image_size // vision.patch_size) ** 2
        shape = ModelShape(
            **vit_sizes(vision, vision.patch_size, patches, has_cls=False),
            projector=(vision.hidden_size * config.scale_factor**2, text.hidden_size),
            **text_sizes(text),
        )
        return read_off(shape, self)
