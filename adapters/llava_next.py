"""LLaVA-NeXT (1.6): a CLIP tower over a thumbnail and tiles, whose mosaic is unpadded and gets a token after each row.

A method ranks the thumbnail and the mosaic each on its own, with budgets in proportion, or jointly (its `scope`). The
row-end tokens leave with the first cut of their picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenprune.adapters._anyres import anyres_visual, split_crops
from tokenprune.adapters._cost import llava_shape
from tokenprune.adapters._vit import Vit, check_patches_only, feature_block, vit_facts
from tokenprune.cost import ModelShape
from tokenprune.interfaces.adapter import Adapter, decoder_of
from tokenprune.interfaces.visual import Visual
from tokenprune.registry import MODELS


class AnyRes(Adapter):
    """What LLaVA-NeXT and LLaVA-NeXT-Video share."""

    def __init__(self, model: Any) -> None:
        config = model.config
        vision = config.vision_config
        check_patches_only(config)
        super().__init__(model)
        tower = decoder_of(model, "model.vision_tower")
        block = feature_block(config.vision_feature_layer, vision.num_hidden_layers)
        facts = vit_facts(vision, block, has_cls=True)
        self.vision = Vit(tower, decoder_of(tower, "encoder.layers"), self.projector, facts, vision.patch_size)
        self._side = vision.image_size // vision.patch_size

    def visuals(self, kind: str, call: Mapping[str, Any]) -> list[Visual]:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        found, config = [], self.model.config
        for size in call["image_sizes"].cpu():  # read here and nowhere else
            crops = image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)

            def pack(values: Tensor, newline: Tensor, size: Tensor = size) -> Tensor:
                packed, _ = self.entry.pack_image_features(
                    [values], size[None], vision_feature_select_strategy="default", image_newline=newline
                )
                return packed[0]

            found.append(anyres_visual(pack, crops, self._side))
        return found

    def pixel_rows(self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        return split_crops(call["pixel_values"], visuals)

    def cost_shape(self) -> ModelShape:
        return llava_shape(self.model.config, has_cls=True)


@MODELS.register("llava_next")
class LlavaNext(AnyRes):
    """Stock `LlavaNextForConditionalGeneration` with a CLIP vision tower."""

    classes = ("LlavaNextForConditionalGeneration",)
