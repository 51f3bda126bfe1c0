"""Cuts inside a tower of which only is known where its blocks are and which rows of them make each visual token.

Before a block the patches of left cells leave, whole cells at a time; behind it the rows are at full length again,
zeros where cells left, for whatever the tower and the model do with them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters._short_rows import ShortRows
from tokenprune.interfaces.vision_tower import VisionTower


@dataclass
class CellRun:
    """One run of a tower.

    Attributes:
        grids: (rows, cols) of visual tokens by picture.
        places: by picture `[cells, g]` int64, where the patches of each token are among those of their picture; where
            all pictures stand in one row sorted by windows, among those of all.
        starts: where each picture begins, where all stand in one row.
        whole: whether places are among those of all pictures.
        alive: by picture, the cells that are left, `[k]` int64 on the CPU; None while all are there.
        short: the rows that are left inside of blocks; None while all are there.
    """

    grids: list[tuple[int, int]]
    places: list[Tensor]
    starts: list[int] = field(default_factory=list)
    whole: bool = False
    alive: list[Tensor] | None = None
    short: ShortRows | None = None

    def in_one(self, picture: int) -> Tensor:
        """`[cells, g]`: places of a picture's patches, where all pictures stand in one row."""
        return self.places[picture] if self.whole else self.places[picture] + self.starts[picture]


class CellCuts(VisionTower):
    """A tower of blocks that leave what they were given, with other states: `[M, T, D]` or all pictures in one row.

    Blocks are called with their states first; a batch of rows that keep different numbers of patches needs a mask,
    which goes to the block or, where it takes none, to its attention.
    """

    before: int = 0
    """Rows before the patches of a picture: [CLS]."""
    restores_blocks = True

    @property
    def exits(self) -> Sequence[Any]:
        return tuple(self.blocks)

    def attention_of_block(self, block: int) -> Any:
        """The attention module of a block; None if it is not known."""
        return None

    def in_batch(self, states: Tensor) -> bool:
        """Whether each picture has a row of its own in a block's states."""
        return states.dim() == 3 and (states.shape[0] > 1 or self.before > 0)

    # --- places -------------------------------------------------------------------------------------------------------

    def rows_at(self, run: CellRun, picture: int, batch: bool, inside: bool) -> Tensor:
        """`[n]` int64 on the CPU: the rows of a picture in its row of a batch, or in the one row of all: [CLS], if
        there is one, and the patches of the tokens that are left, token by token.

        Args:
            inside: whether they are looked for among the rows that blocks compute, else among all.
        """
        first = torch.arange(self.before)
        left = None if run.alive is None else run.alive[picture]
        if batch:
            at = run.places[picture] if left is None else run.places[picture][left]
            if inside and run.short is not None:
                return torch.arange(self.before + at.numel())
            return torch.cat([first, self.before + at.flatten()])
        at = run.in_one(picture) if left is None else run.in_one(picture)[left]
        at = at.flatten()
        if inside and run.short is not None and run.short.before is not None:
            at = run.short.before[at]
        return at

    def states(self, run: CellRun, args: Any, pictures: Sequence[int], count: int) -> Tensor:
        hidden = args[0]
        batch = self._checked_batch(run, hidden)
        found = []
        for picture in pictures:
            at = self.rows_at(run, picture, batch, inside=False)[self.before :].to(hidden.device)
            found.append((hidden[picture] if batch else hidden.flatten(0, -2))[at])
        return self.by_cell(torch.stack(found))

    def _checked_batch(self, run: CellRun, states: Tensor) -> bool:
        batch = self.in_batch(states)
        rows = states.shape[0] if states.dim() == 3 else 1
        if (batch and (rows != len(run.grids) or run.whole)) or (not batch and (rows != 1 or self.before)):
            raise ValueError(
                f"{type(self.module).__name__} has {rows} rows of patches for {len(run.grids)} pictures, in a way that "
                "is not known"
            )
        return batch

    # --- cutting ------------------------------------------------------------------------------------------------------

    def leave(self, run: CellRun, kept: Sequence[Tensor], states: Tensor) -> None:
        """Let all cells go but `kept`, see `drop_tokens`; `states` are those at full length that enter a block."""
        chosen = torch.cat(list(kept)).cpu().split([index.shape[0] for index in kept])  # one read for all
        alive = run.alive or [torch.arange(len(own)) for own in run.places]
        run.alive = [own[index] for own, index in zip(alive, chosen)]
        run.short = None
        batch, length = self._checked_batch(run, states), states.shape[-2]
        rows = [self.rows_at(run, picture, batch, inside=False) for picture in range(len(run.grids))]
        if batch:
            run.short = ShortRows.of_batch(length, rows, states.device)
        else:
            run.short = ShortRows.of_one(length, torch.cat(rows).sort().values, states.device)

    def drop_tokens(self, run: CellRun, args: Any, kwargs: Any, kept: Sequence[Tensor] | None) -> tuple[Any, Any]:
        if kept is not None:
            self.leave(run, kept, args[0])
            self._check_filling(run)
        short = run.short
        if short is None:
            return args, kwargs
        names = self._names()
        given = {**dict(zip(names, args[1:])), **kwargs}
        states = short.hidden(args[0])
        cut = {name: short.given(name, value) for name, value in given.items()}
        if isinstance(cut.get("max_seqlen"), int):
            bounds = next((value for name, value in cut.items() if "cu_seq" in name and value is not None), None)
            cut["max_seqlen"] = cut["max_seqlen"] if bounds is None else int(bounds.diff().max())
        if self.masks_blocks:
            cut["attention_mask"] = short.with_filling(cut.get("attention_mask"), states, self._flash())
        return (states, *args[1 + len(names) :]), cut

    def _names(self) -> list[str]:
        """Of a block's arguments behind its states."""
        parameters = inspect.signature(type(self.blocks[0]).forward).parameters.values()
        return [one.name for one in parameters if one.kind == one.POSITIONAL_OR_KEYWORD][2:]

    @property
    def masks_blocks(self) -> bool:
        """Whether a mask is an argument of blocks."""
        return "attention_mask" in inspect.signature(type(self.blocks[0]).forward).parameters

    def masked_attention(self, block: int) -> Any:
        attention = None if self.masks_blocks else self.attention_of_block(block)
        takes = attention is not None and "attention_mask" in inspect.signature(type(attention).forward).parameters
        return attention if takes else None

    def attention_mask(self, run: CellRun, block: int, states: Tensor) -> Tensor | None:
        if run.short is None or not run.short.filled_up:
            return None
        return run.short.with_filling(None, states, self._flash())

    def _check_filling(self, run: CellRun) -> None:
        """Raise ValueError where rows are filled up and no mask can say so."""
        if run.short is None or not run.short.filled_up or self.masks_blocks or self.masked_attention(0) is not None:
            return
        raise ValueError(
            f"{type(self.blocks[0]).__name__} takes no attention mask, so pictures that keep "
            f"{min(run.short.counts)} to {max(run.short.counts)} patches cannot stand in one batch"
        )

    def _flash(self) -> bool:
        attention = self.attention_of_block(0)
        return "flash" in str(getattr(getattr(attention, "config", None), "_attn_implementation", ""))

    def left_rows(self, run: CellRun, states: Tensor) -> tuple[Tensor, Tensor]:
        """`[M, T]` bool each, or `[1, T]`: rows of cells that left, and rows that stay; of states at full length."""
        batch = self._checked_batch(run, states)
        whole = CellRun(run.grids, run.places, run.starts, run.whole)
        marks = torch.zeros(2, states.shape[0] if batch else 1, states.shape[-2], dtype=torch.bool)
        for picture in range(len(run.grids)):
            row = picture if batch else 0
            marks[0, row, self.rows_at(whole, picture, batch, inside=False)] = True
            marks[1, row, self.rows_at(run, picture, batch, inside=False)] = True
        gone, stays = (marks[0] & ~marks[1]).to(states.device), marks[1].to(states.device)
        return gone, stays

    def replace_states(self, run: CellRun, args: Any, kept: Sequence[Tensor], merged: Sequence[Tensor | None]) -> Any:
        if self.patches_per_cell != 1:
            raise ValueError(
                f"A visual token of {type(self.module).__name__} is {self.patches_per_cell} patches with a state each, "
                "so merged states have no place inside it. Merge at 'input'."
            )
        hidden = args[0].clone()
        batch = self._checked_batch(run, hidden)
        for picture, (index, states) in enumerate(zip(kept, merged)):
            if states is None:
                continue
            at = self.rows_at(run, picture, batch, inside=False)[self.before :].to(hidden.device)[index]
            (hidden[picture] if batch else hidden.view(-1, hidden.shape[-1]))[at] = states.to(hidden.dtype)
        return (hidden, *args[1:])

    def restore_length(self, run: CellRun, output: Tensor, alive: Sequence[Tensor]) -> Tensor:
        return output if run.short is None else run.short.restored(output)

    def computed(self, run: CellRun, counts: Sequence[int]) -> list[int]:
        one_each = run.short is not None and bool(run.short.counts)
        return [max(counts)] * len(counts) if one_each else list(counts)
