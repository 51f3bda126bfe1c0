"""A vision tower without a file of its own, whose signals are read as its attention computes them.

Which patches make a visual token, and in what order the tower has them, is not known of a class. A few orders occur in
all families (`ORDERS`); which of them a tower has is found out at its first picture, by the features that the model
makes of it, and a tower that has none of them gives no signals (`tokenprune.engine.tower_probe`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.adapters._attention_calls import Attended, AttentionCalls, HidingAttention, attention_in
from tokenprune.adapters._cell_cuts import CellCuts, CellRun
from tokenprune.adapters._cost import first_of
from tokenprune.adapters._tower_cost import TowerCost
from tokenprune.adapters._vit import CLIP_PIXELS, IMAGENET_PIXELS, SIGLIP_PIXELS, feature_block
from tokenprune.adapters._windows import has_windows, window_order
from tokenprune.cost import ModelShape
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
from tokenprune.interfaces.visual import TowerWork

ORDERS = ("cells", "raster", "windows")
"""Patches of a picture cell by cell; row by row, with s x s of them a cell; cell by cell, cells sorted by windows."""
_OF_CLS = (CLS_ATTENTION, CLS_WIDE_ATTENTION, CLS_VALUE_SIMILARITY, CLS_PATCH_ATTENTION, CLS_PATCH_SIMILARITY)
_OF_PATCHES = (
    MEAN_VALUE_SIMILARITY, VALUE_NORM, SINK_ATTENTION, SINK_ATTENTION_SUM, TOWER_STATES, TOWER_KEYS, ATTENTION_BY_HEAD,
)  # fmt: skip
_CLS_NAMES = ("class_embedding", "cls_token", "cls_embedding")
_COLOURS = 3
_LAYERS = ("vision_feature_layer", "vision_feature_layers", "vision_feature_select_layer")
_PIXELS = (
    (("CLIP", "Pixtral", "Glm", "Qwen2", "Ernie", "Exaone"), CLIP_PIXELS),
    (("QianfanOCR",), IMAGENET_PIXELS),
)
"""What the published processors of towers normalise with, by how the tower's class begins; others: SigLIP's."""
_found: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
"""What was found out of towers, by tower and kind of visuals."""


class UnreadTower(VisionTower):
    """A tower of which nothing is known but its sizes: it runs as it is.

    Args:
        cost: what it costs; None: not modelled.
    """

    def __init__(self, module: Any, facts: TowerInfo, cost: TowerCost | None = None) -> None:
        self.module, self.blocks, self.exit, self.facts = module, (), None, facts
        self._cost = cost

    def flops(self, shape: ModelShape, work: TowerWork) -> int | None:
        return None if self._cost is None else self._cost.flops(work)

    @property
    def exits(self) -> Sequence[Any]:
        return ()


@dataclass(frozen=True)
class Order:
    """One way in which a tower may have the patches of visual tokens.

    Attributes:
        name: see `ORDERS`.
        patches: g, of each token.
    """

    name: str
    patches: int


class ReadTower(CellCuts, UnreadTower):
    """A tower whose blocks have one module each that calls an attention function of transformers.

    Args:
        module: the tower.
        vision: its config.
        blocks: its blocks.
        facts: see `TowerInfo`.
        cost: what it costs.
        patch: side of a patch in pixels; None if that is not known.
    """

    def __init__(
        self, module: Any, vision: Any, blocks: Any, facts: TowerInfo, cost: TowerCost | None, patch: int | None
    ) -> None:
        super().__init__(module, facts, cost)
        self.blocks, self._vision, self._patch = blocks, vision, patch
        self.before = int(facts.has_cls)
        self.can_cut = self.can_merge = True
        summary = _OF_CLS if facts.has_cls else (MEAN_QUERY_ATTENTION,)
        pixels = (GREY_ENTROPY,) if patch and _convolves(module) else ()
        self.signals = (*summary, *_OF_PATCHES, *pixels)
        self.known: dict[str, Any] = _found.setdefault(module, {})

    # --- orders of patches --------------------------------------------------------------------------------------------

    def possible(self, patches: int) -> list[Order]:
        """The orders that a tower of so many patches a token may have."""
        found = [Order("cells", patches)]
        if patches > 1 and math.isqrt(patches) ** 2 == patches:
            found.append(Order("raster", patches))
        if has_windows(self._vision):
            found.append(Order("windows", patches))
        return found

    def laid_out(self, order: Order, grids: Sequence[tuple[int, int]]) -> CellRun:
        """Where the patches of visual tokens are, if the tower has that order."""
        group, counts = order.patches, [rows * cols for rows, cols in grids]
        starts = [group * sum(counts[:picture]) for picture in range(len(counts))]
        if order.name == "raster":
            places = [raster_places(rows, cols, math.isqrt(group)) for rows, cols in grids]
            return CellRun(list(grids), places, starts)
        inside = torch.arange(group)
        if order.name == "windows":
            at = window_order(self.module, self._vision, grids).argsort()  # place of each cell
            own = (at[:, None] * group + inside).split(counts)
            return CellRun(list(grids), list(own), [0] * len(counts), whole=True)
        return CellRun(list(grids), [torch.arange(n)[:, None] * group + inside for n in counts], starts)

    def in_windows(self, block: int) -> bool:
        """Whether the attention of a block sees a part of a picture only."""
        return has_windows(self._vision) and block not in self._vision.fullatt_block_indexes

    def use(self, order: Order) -> None:
        """Take the patches of the next run to be in this order."""
        self._order, self.patches_per_cell = order, order.patches

    def start(self, grids: Sequence[tuple[int, int]]) -> CellRun:
        return self.laid_out(self._order, grids)

    # --- reading ------------------------------------------------------------------------------------------------------

    def hook_attention(self, block: int, done: Callable[[Any], None]) -> list[Any]:
        def on_done(attended: Attended) -> None:
            def read(run: CellRun, pictures: Sequence[int], count: int) -> tuple[Tensor, ...]:
                parts = (attended.query, attended.key, attended.value)
                return tuple(torch.stack([self.rows(part, run, own) for own in pictures]) for part in parts)

            read.attended = attended  # type: ignore[attr-defined]
            done(read)

        return [AttentionCalls(self._attention(block), on_done)]

    def attention_of_block(self, block: int) -> Any:
        return attention_in(self.blocks[block])

    def hide_keys(self, block: int, gone: Tensor, rows: int) -> list[Any]:
        return [HidingAttention(self._attention(block), gone, rows)]

    def _attention(self, block: int) -> nn.Module:
        attention = attention_in(self.blocks[block])
        if attention is None:
            raise ValueError(
                f"{type(self.blocks[block]).__name__} chooses its attention function in a way that is not known here."
            )
        return attention

    def rows(self, values: Tensor, run: CellRun, picture: int) -> Tensor:
        """Of `[b, H, T, d]` those of one picture, `[H, T', d]`: of [CLS], if there is one, and of the patches of its
        tokens, token by token.

        Raises:
            ValueError: pictures are in these rows in a way that is not known.
        """
        batch = values.shape[0] == len(run.grids) and not run.whole
        if not batch and (values.shape[0] != 1 or self.before):
            raise ValueError(
                f"{type(self.module).__name__} has {values.shape[0]} rows of patches for {len(run.grids)} pictures"
            )
        if batch and run.short is not None and not run.short.counts:
            batch = False  # one picture alone
        at = self.rows_at(run, picture, batch, inside=True).to(values.device)
        return values[picture if batch else 0].index_select(1, at)

    def fills_up(self, run: CellRun, unseen: Tensor) -> bool:
        values = unseen[:, None, :, None]  # [b, 1, T, 1]
        return bool(torch.cat([self.rows(values, run, own).flatten() for own in range(len(run.grids))]).any())

    def by_cell(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (-1, self.patches_per_cell)).mean(dim=2)

    def patch_pixels(self, pixels: Tensor, pictures: int) -> Tensor:
        if pixels.dim() == 4 and pixels.shape[-1] == self._patch and pixels.shape[0] > pictures:  # [patches, C, p, p]
            return pixels.flatten(2).unflatten(0, (pictures, -1))
        if pixels.dim() == 2:  # [patches, C n]
            return pixels.unflatten(-1, (_COLOURS, -1)).unflatten(0, (pictures, -1))
        batch = pixels.reshape(-1, *pixels.shape[-3:])[:pictures]
        patches = batch.unfold(2, self._patch or 1, self._patch or 1).unfold(3, self._patch or 1, self._patch or 1)
        return patches.permute(0, 2, 3, 1, 4, 5).flatten(4).flatten(1, 2)  # [m, r * c, C, p * p]

    def pixels_by_cell(self, values: Tensor, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        return [cells.mean(dim=1) for cells in self._of_cells(values, grids)]

    def cell_pixels(self, pixels: Tensor, grids: Sequence[tuple[int, int]], kind: str) -> list[Tensor]:
        cells = self._of_cells(self.patch_pixels(pixels, len(grids)), grids)  # [cells, g, C, n] each
        return [own.transpose(1, 2).flatten(2) for own in cells]

    def _of_cells(self, values: Tensor, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        """`[cells, g, ...]` of each picture, of values `[pictures, patches, ...]` of its pixels."""
        order = Order("cells", self._order.patches) if self._order.name == "windows" else self._order
        places = self.laid_out(order, grids).places
        if any(own.numel() != values.shape[1] for own in places):
            raise ValueError(
                f"The pixels of a picture are {values.shape[1]} patches, and its tokens come from {places[0].numel()}: "
                "which are whose is not known, so nothing can be read of the pixels of this model's tokens."
            )
        return [own[at.to(own.device)] for own, at in zip(values, places)]


def raster_places(rows: int, cols: int, side: int) -> Tensor:
    """`[cells, s * s]`: numbers of the patches of each cell, counted along the rows of a picture."""
    numbers = torch.arange(rows * cols * side**2).view(rows, side, cols, side)
    return numbers.transpose(1, 2).reshape(rows * cols, side**2)


def blocks_of(tower: Any) -> nn.ModuleList | None:
    """The transformer blocks of a tower whose attention can be read; None if there are none, or several lists."""
    lists = [part for part in tower.modules() if isinstance(part, nn.ModuleList) and len(part)]
    found = [own for own in lists if all(attention_in(block) is not None for block in own)]
    return found[0] if len(found) == 1 else None


def _convolves(tower: Any) -> bool:
    """Whether patches are taken as pictures of three colours: else how pixels are packed into them is not known."""
    kinds = (nn.Conv2d, nn.Conv3d)
    return any(isinstance(part, kinds) and part.in_channels == _COLOURS for part in tower.modules())


def has_cls(tower: Any) -> bool:
    """Whether a tower learns a [CLS] token."""
    return any(name.rpartition(".")[2] in _CLS_NAMES for name, _ in tower.named_parameters())


def tower_of(tower: Any, config: Any, facts: TowerInfo, cost: TowerCost | None) -> UnreadTower:
    """A tower as far as it can be read.

    Args:
        tower: the module; None if the family has none under a known name.
        config: of the model.
        facts: its sizes; which block the features come from and whether there is a [CLS] token is read here.
    """
    blocks = None if tower is None else blocks_of(tower)
    if blocks is None:
        return UnreadTower(tower, facts, cost)
    vision = getattr(tower, "config", None) or config.vision_config
    mean, std = _pixels_of(type(tower).__name__)
    facts = replace(
        facts,
        num_layers=len(blocks),
        feature_layer=_feature_block(config, len(blocks)),
        has_cls=has_cls(tower),
        pixel_mean=mean,
        pixel_std=std,
    )
    return ReadTower(tower, vision, blocks, facts, cost, first_of(vision, "patch_size"))


def _feature_block(config: Any, depth: int) -> int:
    """The last block whose states become features, if the config says so; else the last."""
    named = next((getattr(config, name) for name in _LAYERS if getattr(config, name, None) is not None), -1)
    numbers = [named] if isinstance(named, int) else list(named)
    return max(feature_block(number, depth) for number in numbers)


def _pixels_of(kind: str) -> Any:
    for names, pixels in _PIXELS:
        if kind.startswith(names):
            return pixels
    return SIGLIP_PIXELS
