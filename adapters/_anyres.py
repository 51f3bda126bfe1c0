"""Pictures in crops: a thumbnail, and a mosaic of tiles without its padding and with a separator after each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters._cost import llava_shape, read_off
from tokenprune.adapters._vit import Vit, check_patches_only, feature_block, vit_facts
from tokenprune.cost import ModelShape
from tokenprune.interfaces.adapter import Adapter, submodule
from tokenprune.interfaces.crops import anyres_visual
from tokenprune.interfaces.visual import Raster, Visual


def split_crops(pixels: Tensor, visuals: Sequence[Visual]) -> list[Tensor]:
    """The crops of each picture, from `[images, most crops, C, H, W]` or `[all crops, C, H, W]`."""
    crops = [len(visual.tower_grids) for visual in visuals]
    if pixels.dim() == 5:
        return [padded[:count] for padded, count in zip(pixels, crops)]
    return list(pixels.split(crops))


class AnyRes(Adapter):
    """What LLaVA-NeXT and LLaVA-NeXT-Video share."""

    def __init__(self, model: Any) -> None:
        config = model.config
        vision = config.vision_config
        check_patches_only(config)
        super().__init__(model)
        tower = submodule(model, "model.vision_tower")
        block = feature_block(config.vision_feature_layer, vision.num_hidden_layers)
        facts = vit_facts(vision, block, has_cls=True)
        self.vision = Vit(tower, submodule(tower, "encoder.layers"), self.projector, facts, vision.patch_size)
        self._side = vision.image_size // vision.patch_size

    def visuals(self, kind: str, call: Mapping[str, Any]) -> list[Visual]:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        visuals, config = [], self.model.config
        for size in call["image_sizes"].cpu():  # read here and nowhere else
            crops = image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)

            def pack(values: Tensor, newline: Tensor, size: Tensor = size) -> Tensor:
                packed, _ = self.entry.pack_image_features(
                    [values], size[None], vision_feature_select_strategy="default", image_newline=newline
                )
                return packed[0]

            visuals.append(anyres_visual(pack, crops, self._side))
        return visuals

    def pixel_rows(self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        return split_crops(call["pixel_values"], visuals)

    def cost_shape(self) -> ModelShape:
        return read_off(llava_shape(self.model.config, has_cls=True), self)


def pooled_video(frames: int, side: int, pool: Any, separators: int = 0, before_projector: bool = False) -> Visual:
    """A video of `frames` frames, each `side` x `side` in the tower, by the model's pooling function.

    Args:
        pool: `[frames, side * side, 1]` -> `[frames, n, 1]`.
        separators: placeholders after the last frame.
        before_projector: whether the projector gets what was pooled.
    """
    count = pool(torch.zeros(1, side * side, 1)).shape[1]
    small = round(count**0.5)
    rasters = tuple(Raster((small, small), frame * count, "frame") for frame in range(frames))

    def resample(values: Tensor) -> Tensor:
        pooled = pool(values.view(frames, side * side, -1)).flatten(0, 1)  # [frames * n, C]
        return pooled[:, 0] if values.dim() == 1 else pooled

    return Visual(
        rasters,
        kind="video",
        placeholders=frames * count + separators,
        offsets=torch.arange(frames * count) if separators else None,
        crops=((side, side),) * frames,
        resample=resample,
        projected=frames * count if before_projector else None,
    )
