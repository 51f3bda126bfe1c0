"""InternVL (the Hugging Face classes): a ViT with [CLS] over tiles, 2 x 2 patches joined by pixel shuffle.

The model gets the tiles of all pictures in one row. Those of a picture stand in one unbroken run of placeholders, which
its processor puts between <img> and </img>, and are the rasters of one visual; frames of a video have a run each and
count as pictures. Signals of the tower are means over the patches of a token, which leave it together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters._cost import read_off, text_sizes, vit_sizes
from tokenprune.adapters._tiles import pictures_by_run
from tokenprune.adapters._vit import IMAGENET_PIXELS, feature_block, vit_facts
from tokenprune.adapters._vit_cells import CellVit
from tokenprune.cost import ModelShape
from tokenprune.interfaces.adapter import Adapter, submodule
from tokenprune.interfaces.visual import Pictures, Visual, one_raster
from tokenprune.registry import register_model


@register_model("internvl")
class InternVL(Adapter):
    """Stock `InternVLForConditionalGeneration`."""

    classes = ("InternVLForConditionalGeneration",)

    def __init__(self, model: Any) -> None:
        config = model.config
        vision = config.vision_config
        super().__init__(model)
        tower = submodule(model, "model.vision_tower")
        block = feature_block(config.vision_feature_layer, vision.num_hidden_layers)
        has_cls = config.vision_feature_select_strategy == "default"
        facts = vit_facts(vision, block, has_cls, IMAGENET_PIXELS)
        self._patch = vision.patch_size[0]
        rows, cols = (size // self._patch for size in vision.image_size)
        self._ratio = config.downsample_ratio
        # the model's pixel shuffle, called on patch numbers, says which patches make a token
        numbers = torch.arange(rows * cols, dtype=torch.float64).view(1, rows, cols, 1)
        joined = self.entry.pixel_shuffle(numbers, scale_factor=self._ratio)
        cells = joined.reshape(-1, joined.shape[-1]).long()
        self.vision = CellVit(tower, submodule(tower, "encoder.layer"), self.projector, facts, self._patch, cells)

    def visuals(self, kind: str, call: Mapping[str, Any]) -> list[Visual]:
        pixels = call["pixel_values"]
        rows, cols = (int(side // self._patch * self._ratio) for side in pixels.shape[-2:])
        return [one_raster((rows, cols))] * pixels.shape[0]

    def pictures(self, kind: str, ids: Tensor | None, places: Sequence[Tensor]) -> Pictures:
        return pictures_by_run(places)

    def cost_shape(self) -> ModelShape:
        config = self.model.config
        vision, text = config.vision_config, config.get_text_config()
        joined = vision.hidden_size * self.vision.patches_per_cell
        cells = math.prod(int(size // self._patch * self._ratio) for size in vision.image_size)
        shape = ModelShape(
            **vit_sizes(vision, self._patch, cells * self.vision.patches_per_cell, has_cls=True),
            projector=(joined, text.hidden_size, text.hidden_size),
            **text_sizes(text),
        )
        return read_off(shape, self)
