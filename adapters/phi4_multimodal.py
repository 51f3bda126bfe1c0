"""Phi-4 Multimodal: a SigLIP tower over a thumbnail and tiles of a picture, 2 x 2 patches averaged to a token.

A picture is scaled and filled up to whole tiles. What lies wholly in the filling makes no tokens, and the rest is one
mosaic, before the thumbnail: a separator stands behind each row of both, and one more between the two. These go through
the projector as all tokens do. The tower runs over all tiles, also those that fill up a batch, and is told by a mask
which patches are picture; towers that are read here know of no such mask, so this one gives no signals and is not cut.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.adapters._generic import Generic
from tokenprune.adapters._read_tower import UnreadTower
from tokenprune.adapters._tower_cost import tower_cost
from tokenprune.adapters._vit import feature_block, vit_facts
from tokenprune.cost import ModelShape
from tokenprune.interfaces.visual import Raster, Visual
from tokenprune.registry import register_model


@register_model("phi4_multimodal")
class Phi4Multimodal(Generic):
    """Stock `Phi4MultimodalForCausalLM`, its pictures; audio beside them runs as it is."""

    classes = ("Phi4MultimodalForCausalLM",)
    behind_tower = False
    decoder_is_entry = True
    feature_names: ClassVar[dict[str, str]] = {"image": "embed_tokens_extend.image_embed", "video": ""}
    id_names = ("vision_config.{}_token_id",)
    pixel_names: ClassVar[dict[str, tuple[str, ...]]] = {"image": ("image_pixel_values",), "video": ()}

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        vision, embed = model.config.vision_config, self.entry.embed_tokens_extend.image_embed
        self._tile, self._side = vision.crop_size, (vision.image_size // vision.patch_size + 1) // 2
        tower = embed.img_processor
        facts = vit_facts(vision, feature_block(vision.feature_layer, vision.num_hidden_layers), has_cls=False)
        self.vision = UnreadTower(tower, facts, tower_cost(tower, model.config))
        self._projector_cost = embed.img_projection_up.weight.numel() + embed.img_projection_down.weight.numel()

    def check_call(self, call: Mapping[str, Any]) -> None:
        super().check_call(call)
        if call.get("input_ids") is None and call.get(self.pixels["image"]) is not None:
            raise ValueError(
                f"{type(self.model).__name__} puts no pictures into inputs_embeds, and leaves the image_pixel_values "
                "beside them alone. Pass input_ids."
            )

    def visuals(self, kind: str, call: Mapping[str, Any]) -> list[Visual]:
        ids = call.get("input_ids")
        if ids is not None and not bool((ids == self.placeholder_ids[kind]).any()):
            return []  # `generate` hands pixels to every later token too, and the model passes them by
        masks, sizes = call["image_attention_mask"].cpu(), call["image_sizes"].view(-1, 2).tolist()
        return [self._visual(mask, high // self._tile, wide // self._tile) for mask, (high, wide) in zip(masks, sizes)]

    def _visual(self, mask: Tensor, high: int, wide: int) -> Visual:
        """One picture.

        Args:
            mask: `[tiles, n, n]`, which patches are picture; of the thumbnail first, of what fills up a batch last.
            high, wide: tiles of the mosaic.
        """
        tiles, side = len(mask), self._side

        def mosaic(values: Tensor) -> Tensor:
            """`[high * side, wide * side]` of values `[tiles, side, side]`."""
            own = values[1 : 1 + high * wide].view(high, wide, side, side)
            return own.transpose(1, 2).reshape(high * side, wide * side)

        real = mosaic(mask[:, ::2, ::2])  # by the first patch of each token
        rows, cols = int(real[:, 0].sum()), int(real[0].sum())
        cells = torch.arange(tiles * side**2).view(tiles, side, side)
        start = rows * (cols + 1) + 1  # of the thumbnail
        return Visual(
            (Raster((rows, cols), 0, "mosaic"), Raster((side, side), rows * cols, "thumbnail")),
            placeholders=start + side * (side + 1),
            offsets=torch.cat([_in_rows(rows, cols), start + _in_rows(side, side)]),
            crops=((side, side),) * tiles,
            sources=torch.cat([mosaic(cells)[:rows, :cols].flatten(), cells[0].flatten()]),
            projected=start + side * (side + 1),
        )

    def pixel_rows(self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        # without the tiles that fill up a batch, so that a picture is the same in any
        last = [0 if visual.sources is None else int(visual.sources.max()) // self._side**2 for visual in visuals]
        return [own[: 1 + tile] for own, tile in zip(call[self.pixels[kind]], last)]

    def merged(self, call: Mapping[str, Any]) -> Tensor:
        ids, merge = call["input_ids"], self.entry.embed_tokens_extend
        embeds = self.entry.embed_tokens(ids)
        names = inspect.signature(merge.forward).parameters
        given = {name: value for name, value in call.items() if name in names and name != "input_ids"}
        return merge(ids, **{**given, "inputs_embeds": embeds})

    def cost_shape(self) -> ModelShape:
        # beside its layers the decoder holds nothing but towers and projectors, which see no rows of a prompt
        return dataclasses.replace(super().cost_shape(), beside=0)


def _in_rows(rows: int, cols: int) -> Tensor:
    """`[rows * cols]`: places of tokens that stand in rows, each with a separator behind it."""
    return (torch.arange(rows)[:, None] * (cols + 1) + torch.arange(cols)).flatten()
