"""Prunes in three stages by one map of the vision tower, and recycles what leaves first by grid cells (VFlowOpt).

Paper: "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization", Yang et al.,
ICCV 2025, https://arxiv.org/abs/2508.05211.
Official code: sihany077/VFlowOpt at 129eeef (29 Aug 2025), which implements LLaVA-OneVision only.
Licence: CC BY-NC 4.0 upstream; this file was written from the formulas, no code was copied.
Published: LLaVA-OneVision-7B, mean 50 / 25 / 10 percent of the tokens: POPE 89.4 / 89.1 / 85.2 of 89.1, GQA 62.4 /
61.2 / 57.3 of 62.2, TextVQA 75.1 / 72.5 / 60.2 of 76.0, average over ten benchmarks 99.9 / 96.3 / 85.5 percent (paper).

The map: of the attention of one vision block, mean over heads, the patches are taken that receive more than t times the
mean; I is the mean of the attention rows of these (code; paper: their sum), plus alpha times the softmax over the
picture's patches of the entropy of their grey levels. Stage 1, before the decoder, prunes the lowest and a few more; in
each cell of the grid (side a, a real number; thumbnail and mosaic apart) those are merged into one, with I for weights,
which stands where the highest of them stood. Stages 2 and 3, at one and two thirds of the decoder's depth, prune by the
same map and merge nothing. Ratios of a stage are of the tokens that the stage before it left.

    I_j = mean_{i in D} A[i, j] + alpha softmax_j(E),  D: patches that receive more than t times the mean

The knobs are found offline: `tokenprune tune vflowopt` searches R1, R2, t, a and alpha, and R3 follows from the budget
(`third_ratio`). The shipped ones (`SHIPPED`) have alpha = 0: entropy is off (code).

Our choices and deviations:
- Variants: "official" takes the mean over the patches in question and log2, "paper" their sum and the natural
  logarithm. The code adds 1e-10 inside the logarithm; here 0 log 0 = 0.
- Grey levels are the picture's own, 0 to 255; the code takes normalised pixels, whose negative values wrap. The mean of
  the colours is rounded to the nearest level (code).
- If no patch is above the threshold, the one that receives most stands in (the code gives NaN).
- Weights of a merge are I where it is positive; if a whole cell has none, its members weigh the same.
- `keep` counts the tokens after stage 3, as everywhere; `keep="avg0.25"` is the paper's budget, the mean over the
  layers. Knobs that are not set are the shipped ones, interpolated linearly by the fraction kept at the end. t and a of
  an integer budget are those of 25 %, because signals are set up before N is known.
- With `key_bias` a merged token weighs as many as were merged into it (our choice; off in paper and code).
- headroom "exact": stage 1 prunes just as many more as there are cells, so that the budget is held. "official": it
  prunes int(n / a^2) more, so that the count may differ by a few tokens. Cells are doubled in side while there are more
  of them than budget, under "exact".
- Row-end tokens leave with the first cut, here as with every method; the code keeps all of them.
- Pictures recycle on every family; in the code those in crops only. Frames of videos do not (code).
- [CLS] is left out of rows and columns of the attention; the block is the one whose output makes the visual tokens.
  Towers that merge patches take the mean of I over a token's patches.
- Positions are closed up at stage 1 and kept at stages 2 and 3 (code, LLaVA).
- Depths that are no multiple of 3: stages 2 and 3 are at L // 3 and 2 (L // 3), or at the first layers that can be cut.
- Of tied tokens the later in the raster leaves.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths, Pruner, Stage
from tokenprune.interfaces.search_space import Choice, Range
from tokenprune.interfaces.selection import Selection, refuse_nan, topk_indices
from tokenprune.interfaces.signals import GREY_ENTROPY, SINK_ATTENTION, SINK_ATTENTION_SUM, Signal, TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.interfaces.visual import Raster
from tokenprune.kernels.merge import merge
from tokenprune.registry import register_method

VARIANTS = ("official", "paper")
HEADROOM = ("exact", "official")


@dataclass(frozen=True)
class Knobs:
    """One row of the shipped values (LLaVA-OneVision-7B, 28 layers, code).

    Attributes:
        mean: visual tokens kept, averaged over the layers, as a fraction.
        threshold, cell: t and a.
        first, second, third: kept at each stage, of what the stage before it left.
    """

    mean: float
    threshold: float
    cell: float
    first: float
    second: float
    third: float

    @property
    def last(self) -> float:
        """Fraction kept after stage 3."""
        return self.first * self.second * self.third


SHIPPED = (
    Knobs(0.10, 39.265, 17.387, 0.11662, 1.0, 0.6011),
    Knobs(0.25, 34.760, 15.581, 0.26510, 0.98334, 0.87733),
    Knobs(0.50, 28.683, 11.757, 0.72332, 0.74875, 0.487),
)
_USUAL = SHIPPED[1]


def _between(x: float, points: Sequence[tuple[float, float]]) -> float:
    """Linear interpolation through `points` (x increasing), constant outside."""
    place = bisect_right([at for at, _ in points], x)
    if place == 0 or place == len(points):
        return points[0 if place == 0 else -1][1]
    (x0, y0), (x1, y1) = points[place - 1 : place + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def shipped_ratios(last: float) -> tuple[float, float]:
    """R1 and R2 of a schedule that keeps the fraction `last` in the end: the shipped ones, interpolated."""
    first = _between(last, [(0.0, 0.0), *((row.last, row.first) for row in SHIPPED), (1.0, 1.0)])
    both = _between(last, [(0.0, 0.0), *((row.last, row.first * row.second) for row in SHIPPED), (1.0, 1.0)])
    return first, both / first


def retention(ratios: Sequence[float], layers: Sequence[int]) -> float:
    """Mean over the decoder's layers of the kept fraction: (R1 L1 + R1 R2 L2 + R1 R2 R3 L3) / L."""
    kept, total = 1.0, 0.0
    for ratio, count in zip(ratios, layers):
        kept *= ratio
        total += kept * count
    return total / sum(layers)


def third_ratio(mean: float, first: float, second: float, layers: Sequence[int]) -> float:
    """R3 by the budget equation, at most 1; zero or less where R1 and R2 alone are above the budget.

    Args:
        mean: the budget, see `retention`.
        layers: L1, L2 and L3, decoder layers of each stage.
    """
    l1, l2, l3 = layers
    left = sum(layers) * mean - first * l1 - first * second * l2
    return min(1.0, left / (first * second * l3))


def stage_layers(depths: ModelDepths) -> tuple[int, ...]:
    """Decoder layers before which stages 2 and 3 cut, as far as there are any."""
    second = max(depths.decoder // 3, depths.first_cut)
    third = max(2 * (depths.decoder // 3), second + 1)
    return tuple(layer for layer in (second, third) if layer < depths.decoder)


class StageBudget(Budget):
    """What stage 1 or 2 leaves of N tokens of which `keep` are left after the last; ratios are rounded as in the code.

    Args:
        step: 1 or 2.
        first, second: R1 and R2, None for the shipped ones.
    """

    def __init__(self, keep: int | float, step: int, first: float | None, second: float | None) -> None:
        super().__init__(keep)
        self._step, self._first, self._second = step, first, second

    def tokens(self, num_tokens: int) -> int:
        last = super().tokens(num_tokens)
        # the fraction that was asked for: what rounding makes of it would move the ratios
        first, second = shipped_ratios(self.keep if isinstance(self.keep, float) else last / num_tokens)
        first = first if self._first is None else self._first
        second = second if self._second is None else self._second
        count = max(last, num_tokens - round(num_tokens * (1 - first)))
        return count if self._step == 1 else max(last, count - round(count * (1 - second)))


def grid_cells(rasters: Sequence[Raster], side: float) -> tuple[list[int], int]:
    """For each token of the rasters its cell (floor(row / side), floor(col / side)), numbered over all rasters, and how
    many cells there are."""
    cells: list[int] = []
    before = 0
    for raster in rasters:
        rows, cols = raster.grid
        across = math.floor((cols - 1) / side) + 1
        cells += [
            before + math.floor(row / side) * across + math.floor(col / side)
            for row in range(rows)
            for col in range(cols)
        ]
        before += (math.floor((rows - 1) / side) + 1) * across
    return cells, before


@register_method("vflowopt")
@dataclass
class VFlowOpt(Pruner):
    """Ranks the visual tokens `[M, N]` by the attention that sinks of the vision tower pay them, in three stages.

    Attributes:
        variant: "official" or "paper", see above.
        threshold: t, how many times the mean attention a patch receives whose row counts, at least 0 (0: all rows).
        alpha: weight of the entropy, any sign; 0 leaves it out.
        cell: a, side of the cells in tokens, above 0.
        first, second: R1 and R2, fractions in (0, 1] that stages 1 and 2 keep of what is there. None: the shipped ones.
        recycle: whether stage 1 merges what leaves.
        headroom: "exact" or "official", see above.
        mean, std: what the image processor normalised red, green and blue with (pixels in 0..1), which the model does
            not know; None is what the family's published processors take. Only the entropy looks at them.
    """

    default_scope: ClassVar[str] = "visual"
    merges: ClassVar[bool] = True
    published: ClassVar[str] = "arXiv 2508.05211, sihany077/VFlowOpt"
    plan_options: ClassVar[tuple[str, ...]] = ("first", "second")
    processor_options: ClassVar[Mapping[str, str]] = {"mean": "image_mean", "std": "image_std"}

    variant: str = "official"
    threshold: float | None = None
    alpha: float = 0.0
    cell: float | None = None
    first: float | None = None
    second: float | None = None
    recycle: bool = True
    headroom: str = "exact"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("variant", VARIANTS), ("headroom", HEADROOM)):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}.")
        if self.threshold is not None and not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold must be a number from 0 on, got {self.threshold!r}.")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be a finite weight, got {self.alpha!r}.")
        if self.cell is not None and not 0 < self.cell < math.inf:
            raise ValueError(f"cell must be a side in tokens above 0, got {self.cell!r}.")
        for name in ("first", "second"):
            ratio = getattr(self, name)
            if ratio is not None and not 0 < ratio <= 1:
                raise ValueError(f"{name} must be a kept fraction in (0, 1], got {ratio!r}.")
        for name in ("mean", "std"):
            colours = getattr(self, name)
            if colours is not None and len(colours) != 3:
                raise ValueError(f"{name} must be three numbers, for red, green and blue, got {colours!r}.")

    # --- the plan ---------------------------------------------------------------------------------------------------

    def stages(self, budget: Budget, depths: ModelDepths) -> tuple[Stage, ...]:
        last = budget.keep if isinstance(budget.keep, float) else _USUAL.last
        first_stage = dataclasses.replace(
            self,
            threshold=_between(last, [(row.last, row.threshold) for row in SHIPPED])
            if self.threshold is None
            else self.threshold,
            cell=_between(last, [(row.last, row.cell) for row in SHIPPED]) if self.cell is None else self.cell,
        )
        later = dataclasses.replace(first_stage, positions="keep")
        places = [("input", first_stage), *((f"layer:{layer}", later) for layer in stage_layers(depths))]
        steps = [StageBudget(budget.keep, step, self.first, self.second) for step in range(1, len(places))]
        return tuple(Stage(site, pruner, kept) for (site, pruner), kept in zip(places, [*steps, Budget(budget.keep)]))

    @classmethod
    def search_space(cls, mean: float, depths: ModelDepths) -> Mapping[str, Range | Choice]:
        """The box of the code, which was published for a mean of 25 %; for others R1 is scaled (our choice)."""
        first, second = shipped_ratios(_between(mean, [(0.0, 0.0), *((r.mean, r.last) for r in SHIPPED), (1.0, 1.0)]))
        knobs = [(row.mean, row.threshold, row.cell) for row in SHIPPED]
        return {
            "first": Range(mean, min(1.0, 1.5 * mean), max(first, mean)),
            "second": Range(0.2 / 0.375, 1.0, second),
            "threshold": Range(0.0, 50.0, _between(mean, [(at, t) for at, t, _ in knobs])),
            "cell": Range(3.0, 24.0, _between(mean, [(at, a) for at, _, a in knobs])),
            "alpha": Range(-1.0, 1.0, 0.0),
        }

    @classmethod
    def tuned(cls, values: Mapping[str, Any], mean: float, depths: ModelDepths) -> dict[str, Any] | None:
        layers = stage_layers(depths)
        if len(layers) < 2:
            raise ValueError(f"vflowopt has three stages; a decoder of {depths.decoder} layers has no room for them.")
        lengths = (layers[0], layers[1] - layers[0], depths.decoder - layers[1])
        third = third_ratio(mean, values["first"], values["second"], lengths)
        if third <= 0:
            return None
        return {"method": cls.name, "keep": values["first"] * values["second"] * third, **values}

    # --- the map ----------------------------------------------------------------------------------------------------

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        if place not in ("input", "layer"):
            raise ValueError(
                f"vflowopt ranks by the last block of the vision tower, so it acts at 'input' and 'layer:K', not at "
                f"{place!r}."
            )
        threshold = _USUAL.threshold if self.threshold is None else self.threshold
        name = SINK_ATTENTION if self.variant == "official" else SINK_ATTENTION_SUM
        attention = Signal(name, tower.feature_layer, (float(threshold),))
        if self.alpha == 0:
            return (attention,)
        base = 2.0 if self.variant == "official" else math.e
        colours = (*(self.mean or tower.pixel_mean), *(self.std or tower.pixel_std))
        return (attention, Signal(GREY_ENTROPY, 0, (base, *map(float, colours))))

    def notes(self, tower: TowerInfo) -> tuple[str, ...]:
        notes = []
        if self.threshold is None and tower.has_cls:
            notes.append("knobs as shipped for LLaVA-OneVision's SigLIP; other towers want `tokenprune tune vflowopt`")
        if self.alpha != 0 and (self.mean is None or self.std is None):
            notes.append("grey levels by the pixel normalisation of the family's published processors")
        return tuple(notes)

    def score(self, view: View) -> Tensor:
        """I, `[M, N]` fp32."""
        place, _, depth = view.site.partition(":")
        attention, *entropy = self.signals_at(view.tower, place, int(depth or 0))
        score = view.signal(attention.name, attention.layer, *attention.settings)
        for signal in entropy:
            score = score + self.alpha * view.signal(signal.name, signal.layer, *signal.settings)
        return score

    def select(self, view: View) -> Selection:
        score = self.score(view)
        refuse_nan(score)
        recycle = self.recycle and view.site == "input" and all(raster.kind != "frame" for raster in view.rasters)
        side = _USUAL.cell if self.cell is None else self.cell
        cells, count = grid_cells(view.rasters, side)
        while recycle and self.headroom == "exact" and len(view.rasters) < count > view.budget:
            side *= 2
            cells, count = grid_cells(view.rasters, side)
        if not recycle or (self.headroom == "exact" and count > view.budget):
            return Selection(topk_indices(score, view.budget))
        cell_of_token = torch.tensor(cells, device=score.device)
        cell_of_token = cell_of_token.expand(view.num_images, -1) if view.tokens is None else cell_of_token[view.tokens]
        return self._recycled(view, score, cell_of_token, count)

    def _recycled(self, view: View, score: Tensor, cells: Tensor, count: int) -> Selection:
        """Prune and merge by cells.

        Args:
            score: `[M, N]`.
            cells: `[M, N]` int64, the cell of each token, below `count`.
        """
        images, num_tokens = score.shape
        everything = torch.arange(num_tokens, device=score.device).expand(images, -1)
        order = torch.sort(score, dim=1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(1, order, everything)  # 0 is the highest
        # from the lowest up: which token opens its cell, and what would be left if pruning stopped behind it
        turn = num_tokens - 1 - rank
        opened = torch.full((images, count), num_tokens, device=score.device).scatter_reduce(1, cells, turn, "amin")
        opens = (opened.gather(1, cells) == turn).gather(1, order.flip(1))  # [M, N], lowest score first
        left = num_tokens - 1 - everything + opens.cumsum(dim=1)
        if self.headroom == "exact":
            pruned = (left > view.budget).sum(dim=1, keepdim=True) + 1  # [M, 1]
        else:
            side = _USUAL.cell if self.cell is None else self.cell
            more = num_tokens - view.budget + int(num_tokens / side**2)
            pruned = torch.full((images, 1), min(more, num_tokens), device=score.device)
        leaves = turn < pruned
        best = torch.full((images, count), num_tokens, device=score.device)  # [M, count]
        best = best.scatter_reduce(1, cells, torch.where(leaves, rank, num_tokens), "amin")
        slots = leaves & (best.gather(1, cells) == rank)
        stays = ~leaves | slots
        counts = None if self.headroom == "exact" else stays.sum(dim=1).tolist()
        width = view.budget if counts is None else max(counts)
        kept = torch.where(stays, everything, num_tokens).sort(dim=1).values[:, :width].clamp_max(num_tokens - 1)
        merged = _means(view.features, torch.where(leaves, score.clamp_min(0), 0), leaves, cells, count)
        index = kept[..., None].expand(-1, -1, view.features.shape[-1])  # [M, k, D]
        unmerged = view.features.gather(1, index)
        of_cell = merged.gather(1, cells.gather(1, kept)[..., None].expand_as(index)).to(unmerged.dtype)
        is_slot = slots.gather(1, kept)
        in_cell = torch.zeros(images, count, device=score.device).scatter_add_(1, cells, leaves.float())
        sizes = torch.where(is_slot, in_cell.gather(1, cells.gather(1, kept)), 1.0)
        merged = (~stays).sum(dim=1)
        return Selection(kept, torch.where(is_slot[..., None], of_cell, unmerged), counts, sizes=sizes, merged=merged)


def _means(features: Tensor, weights: Tensor, leaves: Tensor, cells: Tensor, count: int) -> Tensor:
    """Weighted mean of what leaves, by cell: `[M, count, D]`; of equal weights where a cell has none.

    Args:
        features: `[M, N, D]`.
        weights: `[M, N]` fp32, zero at tokens that stay.
        leaves: `[M, N]` bool.
        cells: `[M, N]` int64.
    """
    of_cell = torch.zeros(features.shape[0], count, device=weights.device).scatter_add(1, cells, weights)
    weights = torch.where(of_cell.gather(1, cells) > 0, weights, leaves.float())
    # a token that stays may hold anything, so it is left out rather than multiplied by zero
    return merge(features, torch.where(leaves, cells, -1), count, weights)
