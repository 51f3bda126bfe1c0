"""LLaVA-1.5: CLIP tower with a [CLS] token, MLP projector, decoder with 1-D positions; one fixed grid per image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenprune.adapters._cost import llava_shape, read_off
from tokenprune.adapters._vit import Vit, feature_block, vit_facts
from tokenprune.cost import ModelShape
from tokenprune.interfaces.adapter import Adapter, submodule
from tokenprune.interfaces.visual import Visual, one_raster
from tokenprune.registry import register_model


@register_model("llava")
class Llava(Adapter):
    """Stock `LlavaForConditionalGeneration` with a CLIP vision tower."""

    classes = ("LlavaForConditionalGeneration",)

    @classmethod
    def covers(cls, model: Any) -> bool:
        config = model.config
        clip = config.vision_config.model_type == "clip_vision_model"
        # of one layer, and without [CLS], which has no place in the grid
        one = isinstance(config.vision_feature_layer, int)
        return clip and one and config.vision_feature_select_strategy == "default"

    def __init__(self, model: Any) -> None:
        config = model.config
        vision = config.vision_config
        super().__init__(model)
        self._patch = vision.patch_size
        tower = submodule(model, "model.vision_tower")
        block = feature_block(config.vision_feature_layer, vision.num_hidden_layers)
        facts = vit_facts(vision, block, has_cls=True)
        self.vision = Vit(tower, submodule(tower, "encoder.layers"), self.projector, facts, vision.patch_size)
        self.vision.can_resize = True

    @property
    def num_tokens(self) -> int:
        vision = self.model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def visuals(self, kind: str, call: Mapping[str, Any]) -> list[Visual]:
        pixels = call["pixel_values"]
        rows, cols = (side // self._patch for side in pixels.shape[-2:])
        return [one_raster((rows, cols))] * pixels.shape[0]

    def cost_shape(self) -> ModelShape:
        return read_off(llava_shape(self.model.config, has_cls=True), self)
