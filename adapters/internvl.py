"""InternVL (the Hugging Face classes): a ViT with [CLS] over tiles, 2 x 2 patches joined by pixel shuffle.

A tile counts as an image: `keep` is per tile, because the model is not told which tiles belong together. Signals of the
tower are means over the patches of a token; nothing can leave inside the tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tokenprune.adapters._cost import read_off, text_sizes, vit_sizes
from tokenprune.adapters._vit import IMAGENET_PIXELS, Vit, feature_block, vit_facts
from tokenprune.cost import ModelShape
from tokenprune.interfaces.adapter import Adapter, submodule
from tokenprune.interfaces.visual import Visual, one_raster
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
        self.vision = Vit(
            tower, submodule(tower, "encoder.layer"), self.projector, facts, self._patch, cell_patches=cells
        )

    @property
    def num_tokens(self) -> int:
        rows, cols = (int(size // self._patch * self._ratio) for size in self.model.config.vision_config.image_size)
        return rows * cols

    def visuals(self, kind: str, call: Mapping[str, Any]) -> list[Visual]:
        pixels = call["pixel_values"]
        rows, cols = (int(side // self._patch * self._ratio) for side in pixels.shape[-2:])
        return [one_raster((rows, cols))] * pixels.shape[0]

    def cost_shape(self) -> ModelShape:
        config = self.model.config
        vision, text = config.vision_config, config.get_text_config()
        joined = vision.hidden_size * self.vision.patches_per_cell
        shape = ModelShape(
            **vit_sizes(vision, self._patch, self.num_tokens * self.vision.patches_per_cell, has_cls=True),
            projector=(joined, text.hidden_size, text.hidden_size),
            **text_sizes(text),
        )
        return read_off(shape, self)
