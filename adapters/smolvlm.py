"""SmolVLM and Idefics3: a SigLIP tower over tiles, s x s patches joined by pixel shuffle, text between the tiles, a
Llama decoder.

All pictures of a prompt count as one visual whose tiles are its crops: `keep` is per prompt, because the model is not
told which tiles make a picture. Signals of the tower are means over the patches of a token; nothing can leave inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters._cost import text_sizes, vit_sizes
from tokenprune.adapters._vit import Vit, vit_facts
from tokenprune.cost import ModelShape
from tokenprune.interfaces.adapter import Adapter, submodule
from tokenprune.interfaces.visual import Raster, Visual
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
        self.vision = Vit(
            tower, submodule(tower, "encoder.layers"), self.projector, facts, vision.patch_size, cell_patches=cells
        )

    def _tiles(self, call: Mapping[str, Any]) -> list[int]:
        """Tiles of each prompt; the processor fills up with pictures of zeros, which the model leaves out."""
        real = (call["pixel_values"] != 0).flatten(2).any(dim=2).cpu()
        if not bool(real.any()):
            real[0, 0] = True
        return real.sum(dim=1).tolist()

    def visuals(self, kind: str, call: Mapping[str, Any]) -> list[Visual]:
        side, count = self._side, self._side**2
        return [
            Visual(tuple(Raster((side, side), tile * count, "crop") for tile in range(tiles)), scattered=True)
            for tiles in self._tiles(call)
        ]

    def pixel_rows(self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        return [tiles[: len(visual.rasters)] for tiles, visual in zip(call["pixel_values"], visuals)]

    def cost_shape(self) -> ModelShape:
        config = self.model.config
        vision, text = config.vision_config, config.get_text_config()
        patches = (vision.image_size // vision.patch_size) ** 2
        return ModelShape(
            **vit_sizes(vision, vision.patch_size, patches, has_cls=False),
            projector=(vision.hidden_size * config.scale_factor**2, text.hidden_size),
            **text_sizes(text),
        )
