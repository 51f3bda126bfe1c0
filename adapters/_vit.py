"""Vision towers that take a batch of pictures of one size: CLIP and SigLIP, with or without [CLS]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.cost import ModelShape
from tokenprune.hooks import Scratch
from tokenprune.interfaces.signals import (
    ATTENTION_BY_HEAD,
    CLS_ATTENTION,
    CLS_PATCH_ATTENTION,
    CLS_PATCH_SIMILARITY,
    CLS_VALUE_SIMILARITY,
    CLS_WIDE_ATTENTION,
    GREY_ENTROPY,
    MEAN_QUERY_ATTENTION,
    MEAN_VALUE_SIMILARITY,
    SINK_ATTENTION,
    SINK_ATTENTION_SUM,
    TOWER_KEYS,
    TOWER_STATES,
    VALUE_NORM,
    TowerInfo,
)
from tokenprune.interfaces.vision_tower import VisionTower
from tokenprune.interfaces.visual import TowerWork, Visual


@dataclass
class VitRun:
    """One run of a tower that takes a batch of pictures of one size.

    Attributes:
        cells: of each picture, before any cut.
        mask: `[M, 1, T, T]` additive, -inf at padding behind the patches that are left of a picture; None without any.
    """

    cells: int
    mask: Tensor | None = None


class Vit(VisionTower):
    """A ViT whose blocks are called with `(hidden [M, T, D], attention_mask)`.

    Args:
        module: the tower.
        blocks: its blocks; each has `self_attn` with `q_proj`, `k_proj` and `v_proj`.
        exit: the projector.
        facts: see `TowerInfo`.
        patch: side of a patch in pixels.
        can_cut: whether what comes after the tower works on each patch independently.
        pooling_head: whether the tower pools its last states by attention as well, for costs.
    """

    def __init__(
        self,
        module: Any,
        blocks: Any,
        exit: Any,
        facts: TowerInfo,
        patch: int,
        can_cut: bool = True,
        pooling_head: bool = False,
    ) -> None:
        self._pooling_head = pooling_head
        self.module, self.blocks, self.exit, self.facts, self.can_cut = module, blocks, exit, facts, can_cut
        self.can_merge = True
        cls = (CLS_ATTENTION, CLS_WIDE_ATTENTION, CLS_VALUE_SIMILARITY, CLS_PATCH_ATTENTION, CLS_PATCH_SIMILARITY)
        summary = cls if facts.has_cls else (MEAN_QUERY_ATTENTION,)
        patches = (MEAN_VALUE_SIMILARITY, VALUE_NORM, SINK_ATTENTION, SINK_ATTENTION_SUM)
        self.signals = (*summary, *patches, GREY_ENTROPY, TOWER_STATES, TOWER_KEYS, ATTENTION_BY_HEAD)
        self._patch = patch
        self._before = int(facts.has_cls)

    def hook_attention(self, block: int, done: Callable[[Any], None]) -> list[Any]:
        block_module = self.blocks[block]
        attention = getattr(block_module, "self_attn", None) or block_module.attention
        patches = self.patches_per_cell
        seen = Scratch()

        def heads(projected: Tensor) -> Tensor:
            return projected.detach().unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # [M, H, T, d]

        def keep(name: str) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Tensor) -> None:
                seen.values[name] = heads(output)

            return hook

        def on_done(module: Any, args: Any, output: Any) -> None:
            projected = seen.take("query", "key", "value")

            def read(run: VitRun, pictures: Sequence[int], count: int) -> tuple[Tensor, ...]:
                all_pictures = len(pictures) == projected[0].shape[0]
                length = self._before + count * patches
                return tuple((part if all_pictures else part[list(pictures)])[:, :, :length] for part in projected)

            done(read)

        def after(projection: str, norm: str) -> Any:
            module = getattr(attention, norm, None)
            return getattr(attention, projection) if module is None or isinstance(module, nn.Identity) else module

        return [
            after("q_proj", "q_norm").register_forward_hook(keep("query")),
            after("k_proj", "k_norm").register_forward_hook(keep("key")),
            attention.v_proj.register_forward_hook(keep("value")),
            attention.register_forward_hook(on_done),
        ]

    def computed(self, run: VitRun, counts: Sequence[int]) -> list[int]:
        return [max(counts)] * len(counts)

    def flops(self, shape: ModelShape, work: TowerWork) -> int | None:
        total = super().flops(shape, work)
        if total is None or not self._pooling_head:
            return total
        d = shape.vision_hidden
        group = self.patches_per_cell
        last = work.blocks[-1] if work.blocks else [rows * cols * group for rows, cols in work.grids]
        # one learnt query over the patches of each picture, and an MLP: nothing reads it
        return total + sum(4 * n * d * d + 4 * d * d + 4 * n * d + 4 * d * shape.vision_mlp for n in last)

    def patch_pixels(self, pixels: Tensor, pictures: int) -> Tensor:
        batch = pixels.reshape(pictures, *pixels.shape[-3:])
        patches = batch.unfold(2, self._patch, self._patch).unfold(3, self._patch, self._patch)  # [m, C, r, c, p, p]
        return patches.permute(0, 2, 3, 1, 4, 5).flatten(4).flatten(1, 2)  # [m, r * c, C, p * p]

    def start(self, grids: Sequence[tuple[int, int]]) -> VitRun:
        return VitRun(grids[0][0] * grids[0][1])

    def states(self, run: VitRun, args: Any, pictures: Sequence[int], count: int) -> Tensor:
        left = self._before + count * self.patches_per_cell
        return self.by_cell(args[0][list(pictures), self._before : left])  # [m, count, D]

    def drop_tokens(self, run: VitRun, args: Any, kwargs: Any, kept: Sequence[Tensor] | None) -> tuple[Any, Any]:
        hidden = args[0]
        if kept is not None:
            counts = [index.shape[0] for index in kept]
            longest = max(counts)
            rows = torch.zeros(len(kept), longest, dtype=torch.int64, device=hidden.device)
            for row, index in enumerate(kept):
                rows[row, : counts[row]] = index
            body = hidden[:, self._before :].gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
            hidden = torch.cat([hidden[:, : self._before], body], dim=1)
            run.mask = None
            if min(counts) != longest:
                real = torch.arange(longest)[None] < torch.tensor(counts)[:, None]
                real = torch.cat([torch.ones(len(kept), self._before, dtype=torch.bool), real], dim=1).to(hidden.device)
                mask = torch.zeros(real.shape, dtype=hidden.dtype, device=hidden.device)
                # additive, which both SDPA and eager attention take
                run.mask = mask.masked_fill(~real, torch.finfo(hidden.dtype).min)[:, None, None]
                run.mask = run.mask.expand(-1, 1, real.shape[1], -1)  # [M, 1, T, T]
        if "attention_mask" in kwargs:
            return (hidden, *args[1:]), {**kwargs, "attention_mask": run.mask}
        return (hidden, run.mask, *args[2:]), kwargs

    def replace_states(self, run: VitRun, args: Any, kept: Sequence[Tensor], merged: Sequence[Tensor | None]) -> Any:
        hidden = args[0].clone()
        for row, (index, states) in enumerate(zip(kept, merged)):
            if states is not None:
                hidden[row, self._before + index] = states.to(hidden.dtype)
        return (hidden, *args[1:])

    def restore_length(self, run: VitRun, output: Tensor, alive: Sequence[Tensor]) -> Tensor:
        full = output.new_zeros(output.shape[0], run.cells, output.shape[-1])
        for row, places in enumerate(alive):
            full[row, places] = output[row, : places.shape[0]]
        return full

    def resize(
        self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual], grids: Sequence[tuple[int, int]]
    ) -> Mapping[str, Any]:
        pixels, grid = call["pixel_values"], grids[0]
        size = (grid[0] * self._patch, grid[1] * self._patch)
        small = torch.nn.functional.interpolate(
            pixels.float(), size=size, mode="bicubic", antialias=True, align_corners=False
        )
        return {**call, "pixel_values": small.to(pixels.dtype), "interpolate_pos_encoding": True}


CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIGLIP_PIXELS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and standard deviation of red, green and blue in the published processors of these towers."""


def vit_facts(vision: Any, feature_block: int, has_cls: bool, pixels: Any = None) -> TowerInfo:
    """Facts from a CLIP or SigLIP vision config; `feature_block` is 0-based. `pixels` is one of the pairs above; None
    takes CLIP's for towers with [CLS] and SigLIP's for others."""
    mean, std = pixels or (CLIP_PIXELS if has_cls else SIGLIP_PIXELS)
    return TowerInfo(
        num_layers=vision.num_hidden_layers,
        feature_layer=feature_block,
        has_cls=has_cls,
        num_heads=vision.num_attention_heads,
        hidden_size=vision.hidden_size,
        pixel_mean=mean,
        pixel_std=std,
    )


def check_patches_only(config: Any) -> None:
    """Raise ValueError if a [CLS] token is among the visual tokens."""
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"vision_feature_select_strategy must be 'default' (patches only), got "
            f"{config.vision_feature_select_strategy!r}: a [CLS] token among the visual tokens has no place in the "
            "grid."
        )


def feature_block(layer: Any, depth: int) -> int:
    """0-based block whose output is an entry of `hidden_states`, which has depth + 1 entries, the first being the
    embeddings.

    Raises:
        ValueError: several layers are joined; they have no common raster.
    """
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer must be one layer, got {layer!r}; several have no common raster.")
    return (layer if layer >= 0 else depth + 1 + layer) - 1
