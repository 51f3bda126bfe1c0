"""A ViT over tiles of one size of which a pixel shuffle joins s x s patches to each visual token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters._cell_cuts import CellCuts, CellRun
from tokenprune.adapters._vit import Vit
from tokenprune.interfaces.signals import TowerInfo


class CellVit(CellCuts, Vit):
    """As `Vit`; a token's patches leave together, before the shuffle.

    Args:
        module, blocks, exit, facts, patch, can_cut, pooling_head: see `Vit`.
        cells: `[cells, g]` int64, the patches that are joined into each visual token.
    """

    def __init__(
        self,
        module: Any,
        blocks: Any,
        exit: Any,
        facts: TowerInfo,
        patch: int,
        cells: Tensor,
        can_cut: bool = True,
        pooling_head: bool = False,
    ) -> None:
        super().__init__(module, blocks, exit, facts, patch, can_cut, pooling_head)
        self.can_merge = False
        self._cells, self.patches_per_cell, self.before = cells.cpu(), cells.shape[1], self._before

    def attention_of_block(self, block: int) -> Any:
        module = self.blocks[block]
        return getattr(module, "self_attn", None) or module.attention

    def start(self, grids: Sequence[tuple[int, int]]) -> CellRun:  # type: ignore[override]
        return CellRun(list(grids), [self._cells] * len(grids))

    def in_batch(self, states: Tensor) -> bool:
        return True

    def hook_attention(self, block: int, done: Callable[[Any], None]) -> list[Any]:
        def cell_by_cell(read: Any) -> None:
            def parts(run: CellRun, pictures: Sequence[int], count: int) -> tuple[Tensor, ...]:
                found = read(run, pictures, count)
                if run.short is not None:  # rows that are left come cell by cell
                    return found
                order = torch.cat([torch.arange(self.before), self.before + self._cells.flatten()])
                return tuple(part.index_select(2, order.to(part.device)) for part in found)

            done(parts)

        return super().hook_attention(block, cell_by_cell)

    def by_cell(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (-1, self.patches_per_cell)).mean(dim=2)

    def patch_pixels(self, pixels: Tensor, pictures: int) -> Tensor:
        return super().patch_pixels(pixels, pictures)[:, self._cells.flatten().to(pixels.device)]
