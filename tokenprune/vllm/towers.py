"""vLLM's vision towers as the engine reads towers: what the attention of a block multiplies, and what a block leaves.

Queries, keys and values are taken where a block hands them to vLLM's attention over pictures, behind norms and
rotation. Where the heads of a tower are dealt out over several devices, they are gathered first.
"""

# vLLM is not there where types are checked
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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

_PATCHES = (
    MEAN_VALUE_SIMILARITY, VALUE_NORM, SINK_ATTENTION, SINK_ATTENTION_SUM, GREY_ENTROPY, TOWER_STATES, TOWER_KEYS,
    ATTENTION_BY_HEAD,
)  # fmt: skip
CLS_SIGNALS = (
    CLS_ATTENTION, CLS_WIDE_ATTENTION, CLS_VALUE_SIMILARITY, CLS_PATCH_ATTENTION, CLS_PATCH_SIMILARITY, *_PATCHES
)  # fmt: skip
PATCH_ONLY_SIGNALS = (MEAN_QUERY_ATTENTION, *_PATCHES)

Gather = Callable[[Tensor], Tensor]


def gather_heads(heads: Tensor) -> Tensor:
    """`[..., h, d]` of one device to `[..., H, d]` of all that share a tower, in the order of the heads."""
    from vllm.distributed import tensor_model_parallel_all_gather

    return tensor_model_parallel_all_gather(heads.contiguous(), dim=-2)


class VllmTower(VisionTower):
    """What towers have in common.

    Args:
        module: the tower.
        blocks: those of its blocks that vLLM built.
        attention: from a block to the module that is called with query, key and value.
        facts: see `TowerInfo`.
        gather: see `gather_heads`.
    """

    def __init__(
        self,
        module: Any,
        blocks: Sequence[Any],
        attention: Callable[[Any], Any],
        facts: TowerInfo,
        gather: Gather = gather_heads,
    ) -> None:
        self.module, self.blocks, self.facts = module, blocks, facts
        self.signals = CLS_SIGNALS if facts.has_cls else PATCH_ONLY_SIGNALS
        self._attention, self._gather = attention, gather

    def hook_attention(self, block: int, done: Any) -> list[Any]:
        def before(module: Any, args: Any, kwargs: Any) -> None:
            given = [*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)][:3]
            parts = tuple(self._all_heads(part.detach()) for part in given)
            done(lambda run, pictures, count: self.read(run, pictures, count, parts))

        module = self._attention(self.blocks[block])
        return [module.register_forward_pre_hook(before, with_kwargs=True)]

    def _all_heads(self, part: Tensor) -> Tensor:
        """`[B, T, H, d]` from what attention is given, `[B, T, h d]` or `[B, T, h, d]`."""
        width = self.facts.hidden_size // self.facts.num_heads
        heads = part if part.dim() == 4 else part.unflatten(-1, (-1, width))
        return heads if heads.shape[-2] == self.facts.num_heads else self._gather(heads)

    def read(self, run: Any, pictures: Sequence[int], count: int, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Query, key and value `[m, H, T, d]` of some pictures."""
        raise NotImplementedError


class BatchTower(VllmTower):
    """A tower that takes a batch of pictures of one size, `[M, T, D]`, each a patch a token.

    Args:
        patch: side of a patch in pixels.
    """

    def __init__(self, module: Any, blocks: Any, attention: Any, facts: TowerInfo, patch: int, **more: Any) -> None:
        super().__init__(module, blocks, attention, facts, **more)
        self._patch, self._before = patch, int(facts.has_cls)

    def read(self, run: Any, pictures: Sequence[int], count: int, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(part[list(pictures)].transpose(1, 2) for part in parts)

    def states(self, run: Any, args: Any, pictures: Sequence[int], count: int) -> Tensor:
        return args[0][list(pictures), self._before :]

    def patch_pixels(self, pixels: Tensor, pictures: int) -> Tensor:
        batch = pixels.reshape(pictures, *pixels.shape[-3:])
        patches = batch.unfold(2, self._patch, self._patch).unfold(3, self._patch, self._patch)  # [m, C, r, c, p, p]
        return patches.permute(0, 2, 3, 1, 4, 5).flatten(4).flatten(1, 2)  # [m, r * c, C, p * p]


class TiledTower(BatchTower):
    """A tower of tiles of which a pixel shuffle joins patches to each visual token.

    Args:
        cells: `[cells, g]` int64, the patches of each token.
    """

    def __init__(self, module: Any, blocks: Any, attention: Any, facts: TowerInfo, patch: int, cells: Tensor) -> None:
        super().__init__(module, blocks, attention, facts, patch)
        self._cells, self.patches_per_cell = cells.cpu(), cells.shape[1]

    def read(self, run: Any, pictures: Sequence[int], count: int, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        order = torch.cat([torch.arange(self._before), self._before + self._cells.flatten()])
        found = super().read(run, pictures, count, parts)
        return tuple(part.index_select(2, order.to(part.device)) for part in found)

    def states(self, run: Any, args: Any, pictures: Sequence[int], count: int) -> Tensor:
        return self.by_cell(super().states(run, args, pictures, count)[:, self._cells.flatten()])

    def by_cell(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (-1, self.patches_per_cell)).mean(dim=2)

    def patch_pixels(self, pixels: Tensor, pictures: int) -> Tensor:
        return super().patch_pixels(pixels, pictures)[:, self._cells.flatten().to(pixels.device)]


class PackedTower(VllmTower):
    """A tower that has the patches of all pictures in one row, by cells of merge x merge patches.

    Args:
        merge: patches along a side of a cell.
        channels: of the pixels.
        moments: frames that a patch spans.
        order: of a picture of (rows, cols) cells, which cell stands at each place of the row, `[cells]` int64; None
            where rows are in raster order.
    """

    def __init__(
        self,
        module: Any,
        attention: Callable[[Any], Any],
        facts: TowerInfo,
        merge: int,
        channels: int,
        moments: int,
        order: Callable[[int, int], Tensor] | None,
        **more: Any,
    ) -> None:
        super().__init__(module, module.blocks, attention, facts, **more)
        self.patches_per_cell, self.moments = merge**2, moments
        self._channels, self._order = channels, order

    def hook_states(self, block: int, done: Callable[[Tensor], None]) -> list[Any]:
        """Read what the norm behind a block is given: vLLM calls the blocks themselves past the hooks of modules,
        because it may compile them."""
        last = block + 1 == len(self.blocks)
        merger = self.module.merger
        norm = (merger.norm if hasattr(merger, "norm") else merger.ln_q) if last else self.blocks[block + 1].norm1
        return [norm.register_forward_pre_hook(lambda module, args: done(args[0].detach()))]

    def start(self, grids: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return list(grids)

    def _starts(self, run: list[tuple[int, int]], pictures: Sequence[int]) -> list[int]:
        counts = [rows * cols for rows, cols in run]
        return [self.patches_per_cell * sum(counts[:picture]) for picture in pictures]

    def read(self, run: Any, pictures: Sequence[int], count: int, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        length = count * self.patches_per_cell
        rows = [part.flatten(0, 1) for part in parts]  # [S, H, d]: one of the two is 1
        return tuple(
            torch.stack([row[at : at + length] for at in self._starts(run, pictures)]).transpose(1, 2) for row in rows
        )

    def states(self, run: Any, args: Any, pictures: Sequence[int], count: int) -> Tensor:
        row = args[0].reshape(-1, args[0].shape[-1]).unflatten(0, (-1, self.patches_per_cell)).mean(dim=1)
        starts = [at // self.patches_per_cell for at in self._starts(run, pictures)]
        return self.in_raster_order(run, torch.stack([row[at : at + count] for at in starts]), pictures)

    def in_raster_order(self, run: Any, values: Tensor, pictures: Sequence[int]) -> Tensor:
        if self._order is None:
            return values
        places = [self._order(*run[picture]).argsort().to(values.device) for picture in pictures]
        return torch.stack([value[index] for value, index in zip(values, places)])

    def by_cell(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (-1, self.patches_per_cell)).mean(dim=2)

    def patch_pixels(self, pixels: Tensor, pictures: int) -> Tensor:
        return pixels.reshape(pictures, -1, self._channels, pixels.shape[-1] // self._channels)
