"""Signals that are vectors, against the towers themselves: SigLIP, pictures in crops, and Qwen's packed rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from _families import batch_of, family
from masked_reference import relative_error

import tokenprune
from tokenprune.api import adapter_for
from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection
from tokenprune.interfaces.signals import ATTENTION_BY_HEAD, TOWER_KEYS, TOWER_STATES, Signal, TowerInfo
from tokenprune.interfaces.view import View

NAMES = (TOWER_STATES, TOWER_KEYS, ATTENTION_BY_HEAD)


@dataclass
class _Reader(Pruner):
    """Keeps everything and remembers what it was given of each picture, by its place in the batch."""

    adaptive: ClassVar[bool] = True
    default_scope: ClassVar[str] = "visual"
    hints: ClassVar[tuple[str, ...]] = ("place",)
    block: int = 0
    seen: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        return tuple(Signal(name, self.block) for name in NAMES)

    def select(self, view: View) -> Selection:
        for row, place in enumerate(view.hints["place"]):
            self.seen[place] = [view.signal(name, self.block)[row] for name in NAMES]
        return Selection(torch.arange(view.num_tokens).expand(view.num_images, -1))


def vectors(model: Any, batch: dict[str, torch.Tensor], block: int) -> list[list[torch.Tensor]]:
    """States, keys and attention by head of each picture, in batch order."""
    reader = _Reader(block=block)
    with tokenprune.applied(model, reader, keep=1.0) as handle, torch.no_grad():
        handle.set_hints(place=list(range(64)))
        model(**batch)
        assert handle.last is not None
        assert sorted(reader.seen) == list(range(len(handle.last.layout.spans)))
    return [reader.seen[place] for place in sorted(reader.seen)]


@pytest.mark.parametrize("back", [0, 1])
@pytest.mark.parametrize("layout", ["one_left", "ragged_left", "interpolated_left"])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_vectors_of_crops_are_those_of_the_tower_as_the_model_packs_them(name, layout, back):
    """The truth is packed by the model's own function, in a basis of its own for each channel."""
    if name == "llava_next" and layout == "interpolated_left":
        layout = "ragged_right"  # this family never resizes a mosaic
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    model, batch = family(name, "eager"), batch_of(name, layout)
    facts = adapter_for(model).tower
    block, before = facts.feature_layer - back, int(facts.has_cls)
    tower, sizes = model.model.vision_tower, batch["image_sizes"]
    layer, seen = tower.encoder.layers[block], {}
    hook = layer.register_forward_hook(lambda m, args, output: seen.update(entered=args[0], left=output))
    crops = [image_size_to_num_patches(size, model.config.image_grid_pinpoints, 28) for size in sizes.tolist()]
    pixels = torch.cat([one[:count] for one, count in zip(batch["pixel_values"], crops, strict=True)])
    try:
        with torch.no_grad():
            output = tower(pixels, output_hidden_states=True, output_attentions=True)
            keys = layer.self_attn.k_proj(layer.layer_norm1(seen["entered"]))
    finally:
        hook.remove()
    if block + 1 < facts.num_layers:  # the last entry may be behind a norm
        assert torch.equal(output.hidden_states[block + 1], seen["left"])
    attention = output.attentions[block]  # [crops, H, T, T]
    rows = attention[:, :, 0, before:] if before else attention.mean(2)
    truths = seen["left"][:, before:], keys[:, before:], rows.transpose(1, 2)
    found = vectors(model, batch, block)
    more = {"vision_feature_select_strategy": "default"}
    if name == "llava_onevision":
        more = {"vision_aspect_ratio": model.config.vision_aspect_ratio}
    for number, truth in enumerate(truths):
        packed, _ = model.model.pack_image_features(
            truth.split(crops), sizes, image_newline=torch.full((truth.shape[-1],), math.inf), **more
        )
        for picture, whole in zip(found, packed, strict=True):
            expected = whole[whole.isfinite().all(dim=1)]
            assert picture[number].shape == expected.shape
            assert relative_error(picture[number], expected) < 1e-5


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("layout", ["one_left", "ragged_left", "ragged_right"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_vectors_of_packed_rows_stand_at_their_tokens(name, layout, block):
    """Rows of Qwen2.5-VL's tower are sorted by windows, and some of its blocks attend within them."""
    model, batch = family(name), batch_of(name, layout)
    tower, seen = model.model.visual, {}
    module = tower.blocks[block]
    hooks = [
        tower.blocks[0].register_forward_pre_hook(lambda m, args, kw: seen.update(first=args[0]), with_kwargs=True),
        module.register_forward_hook(lambda m, args, output: seen.update(states=output)),
        module.attn.register_forward_pre_hook(lambda m, args, kw: seen.update(kw), with_kwargs=True),
        module.attn.qkv.register_forward_hook(lambda m, args, output: seen.update(qkv=output)),
    ]
    try:
        found = vectors(model, batch, block)
    finally:
        for hook in hooks:
            hook.remove()
    place = torch.arange(len(seen["first"]))
    if name == "qwen2_5_vl":  # which patch stands where is read off the embeddings
        embeds = tower.patch_embed(batch["pixel_values"])
        place = (seen["first"][:, None] == embeds[None]).all(-1).int().argmax(1)
        assert not torch.equal(place, torch.arange(len(place)))
    raster = place.argsort()
    query, key, _ = (part.double() for part in seen["qkv"].unflatten(-1, (3, 4, -1)).unbind(1))  # [patches, H, d]
    cos, sin = (part[:, None].double() for part in seen["position_embeddings"])

    def turned(values):
        first, second = values.chunk(2, dim=-1)
        return (values * cos + torch.cat([-second, first], -1) * sin)[raster]

    query, key, states = turned(query), turned(key), seen["states"].double()[raster]
    start = 0
    for grid, (got_states, got_keys, got_heads) in zip(batch["image_grid_thw"].tolist(), found, strict=True):
        part = slice(start, start + math.prod(grid))
        scores = torch.einsum("qhd,khd->hqk", query[part], key[part]) / math.sqrt(key.shape[-1])
        received = scores.softmax(-1).mean(1).transpose(0, 1)  # [patches, H]
        for got, truth in ((got_states, states[part]), (got_keys, key[part].flatten(1)), (got_heads, received)):
            assert got.dtype == torch.float32
            assert relative_error(got, truth.unflatten(0, (-1, 4)).mean(1)) < 1e-5
        start += math.prod(grid)
