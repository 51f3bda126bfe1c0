"""Granite 4 Vision: nothing of a picture stands in the rows; features of several depths are added inside the decoder.

Rows of visual tokens are zeros at the decoder's input, and before each of some layers features are added to them: those
of one depth of the tower, or of one patch out of each 2 x 2. What is added is cut in step with the tokens, and methods
at the input choose by what is added first. Tokens are those of a thumbnail and a mosaic of tiles, with one more behind
each row, as in LLaVA-NeXT.

A Q-Former makes tokens in windows. Each has its own place there, that of s x s patches, and its query is made of them,
though it looks at the other patches of the window as well: signals of the tower are means over these s x s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor

from tokenprune.adapters._anyres import split_crops
from tokenprune.adapters._cost import vit_sizes
from tokenprune.adapters._generic import Generic
from tokenprune.adapters._read_tower import raster_places
from tokenprune.adapters._vit import feature_block, vit_facts
from tokenprune.adapters._vit_cells import CellVit
from tokenprune.cost import ModelShape
from tokenprune.interfaces.adapter import submodule
from tokenprune.interfaces.crops import anyres_visual
from tokenprune.interfaces.visual import Visual
from tokenprune.registry import register_model


@register_model("granite4_vision")
class Granite4Vision(Generic):
    """Stock `Granite4VisionForConditionalGeneration`."""

    classes = ("Granite4VisionForConditionalGeneration",)
    behind_tower = False
    added_inside = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config, vision = model.config, model.config.vision_config
        ratio = Fraction(config.downsample_rate)  # tokens by patches, along a side
        self._patches = vision.image_size // vision.patch_size
        self._side = int(self._patches * ratio)
        self._has_cls = config.vision_feature_select_strategy == "default"
        if ratio.numerator == 1:
            depths = [config.spatial_vision_layer, *(depth for depth, _ in config.deepstack_layer_map)]
            block = max(feature_block(depth, vision.num_hidden_layers) for depth in depths)
            tower = submodule(self.entry, "vision_tower")
            self.vision = CellVit(
                tower, submodule(tower, "encoder.layers"), self.entry.spatial_projectors,
                vit_facts(vision, block, self._has_cls), vision.patch_size,
                raster_places(self._side, self._side, ratio.denominator),
                can_cut=False,  # a Q-Former's queries look at all patches of their window
                pooling_head=bool(getattr(tower, "use_head", False)),
            )  # fmt: skip

    def visuals(self, kind: str, call: Mapping[str, Any]) -> list[Visual]:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        visuals, config = [], self.model.config
        for size in call["image_sizes"].cpu():
            crops = image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)

            def pack(values: Tensor, newline: Tensor, size: Tensor = size) -> Tensor:
                packed = self.entry.pack_image_features([values], size[None], "full", image_newline=newline)
                return (packed[0] if isinstance(packed, tuple) else packed)[0]  # older releases count them, too

            visuals.append(anyres_visual(pack, crops, self._side))
        return visuals

    def pixel_rows(self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        return split_crops(call["pixel_values"], visuals)

    def rows_seen(self, kwargs: Mapping[str, Any], embeds: Tensor) -> Tensor:
        mask, added = kwargs.get("vision_mask"), kwargs.get("deepstack_features")
        if mask is None or not added:
            return embeds
        return embeds.masked_scatter(mask.to(embeds.device), added[min(added)].to(embeds))

    def per_token_kwargs(
        self, kwargs: Mapping[str, Any], rows: Callable[[Tensor], Tensor], real: Tensor
    ) -> dict[str, Any]:
        mask, added = kwargs.get("vision_mask"), kwargs.get("deepstack_features")
        if mask is None or not added:
            return {}
        visual = mask[..., 0]  # [B, S]
        number = rows((visual.flatten().cumsum(0) - 1).view(visual.shape))  # of the row of features at each place
        short = rows(visual) & real.to(visual.device)
        left = number.flatten()[short.flatten().nonzero()[:, 0]]
        return {
            "vision_mask": short[..., None].expand(*short.shape, mask.shape[-1]),
            "deepstack_features": {layer: features[left] for layer, features in added.items()},
        }

    def cost_shape(self) -> ModelShape:
        vision = self.model.config.vision_config
        sizes = vit_sizes(vision, vision.patch_size, self._patches**2, self._has_cls)
        return dataclasses.replace(super().cost_shape(), **sizes)
