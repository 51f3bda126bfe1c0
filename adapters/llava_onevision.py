"""LLaVA-OneVision: a SigLIP tower without [CLS], pictures in crops, videos pooled by frame, a Qwen2 decoder.

Large mosaics are interpolated down by the model: their tokens are mixed from several patches, and so are a video's, so
that for these nothing can leave inside the tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenprune.adapters._anyres import pooled_video, split_crops
from tokenprune.adapters._cost import llava_shape, read_off
from tokenprune.adapters._vit import Vit, feature_block, vit_facts
from tokenprune.cost import ModelShape
from tokenprune.interfaces.adapter import Adapter, submodule
from tokenprune.interfaces.crops import anyres_visual
from tokenprune.interfaces.visual import Visual
from tokenprune.registry import register_model


@register_model("llava_onevision")
class LlavaOnevision(Adapter):
    """Stock `LlavaOnevisionForConditionalGeneration` with a SigLIP vision tower."""

    classes = ("LlavaOnevisionForConditionalGeneration",)
    features = {"image": "get_image_features", "video": "get_video_features"}

    def __init__(self, model: Any) -> None:
        config = model.config
        vision = config.vision_config
        super().__init__(model)
        tower = submodule(model, "model.vision_tower")
        block = feature_block(config.vision_feature_layer, vision.num_hidden_layers)
        facts = vit_facts(vision, block, has_cls=False)
        blocks, head = submodule(tower, "encoder.layers"), bool(getattr(tower, "use_head", False))
        self.vision = Vit(tower, blocks, self.projector, facts, vision.patch_size, pooling_head=head)
        self._side = vision.image_size // vision.patch_size

    def _crops(self, sizes: Tensor, numbers: Any) -> list[int]:
        """Crops of each picture of `sizes` `[M, 2]`, on the CPU; `numbers`: pictures of each prompt, or None."""
        from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

        config = self.model.config
        if isinstance(numbers, Tensor):
            numbers = numbers.tolist()
        tiled = [True] * len(sizes) if numbers is None else [n == 1 for n in numbers for _ in range(n)]
        points, side = config.image_grid_pinpoints, config.vision_config.image_size
        return [
            image_size_to_num_patches(size, points, side) if is_tiled else 1 for size, is_tiled in zip(sizes, tiled)
        ]

    def visuals(self, kind: str, call: Mapping[str, Any]) -> list[Visual]:
        if kind == "video":
            videos, frames = call["pixel_values_videos"].shape[:2]
            return [pooled_video(frames, self._side, self.entry.apply_pooling, separators=1)] * videos
        ratio = call.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        visuals, sizes = [], call["image_sizes"].cpu()  # read here and nowhere else
        for size, crops in zip(sizes, self._crops(sizes, call.get("batch_num_images"))):

            def pack(values: Tensor, newline: Tensor, size: Tensor = size) -> Tensor:
                packed, _ = self.entry.pack_image_features(
                    [values], size[None], image_newline=newline, vision_aspect_ratio=ratio
                )
                return packed[0]

            visuals.append(anyres_visual(pack, crops, self._side))
        return visuals

    def pixel_rows(self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        if kind == "video":
            return list(call["pixel_values_videos"])
        return split_crops(call["pixel_values"], visuals)

    def cost_shape(self) -> ModelShape:
        return read_off(llava_shape(self.model.config, has_cls=False), self)
