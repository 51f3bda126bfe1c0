"""Drops patches whose pixels a neighbour already predicts, before the vision tower runs (PixelPrune).

Paper: "PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding", Wang, Jin, Chen, Lu, 2026,
https://arxiv.org/abs/2604.00886 (abstract only; the rule below is that of the code).
Official code: OPPO-Mente-Lab/PixelPrune at a870e31 (9 Apr 2026).
Licence: Apache-2.0 upstream; this file was written from the formulas, no code was copied.

A cell is what becomes one visual token; its pixels g are those before normalisation, in 0..1. Two cells are alike where
their distance is at most tau. With A, B and C the cells to the left, above, and above to the left, the prediction of a
cell is A in row 0 and B in column 0; elsewhere B where C is like A and not like B, else A. A cell stays where it is not
like its prediction; the first one always stays. Neighbours are the picture's own pixels (sliding), or what a decoder
would have there (anchored): a cell's own pixels where it stays, its prediction where it left, so that what is dropped
is never further than tau from what it is taken for. At tau = 0 the two are one.

    p = B if |C - A| <= tau < |C - B|, else A
    the cell stays where |g - p| > tau

The tower then runs on the cells that stay, each with the position that it had, and so does the decoder.

The method decides by picture how many stay: all of a photo, few of a screenshot. Our choices:
- `keep` is a cap: where more would stay, tau is bisected upwards in that picture alone (from tau to the range of its
  values, 12 halvings) until at most so many stay; `keep=1.0` caps nothing. How many stay need not fall with tau, so the
  tau found is one that meets the cap, not always the least.
- Anchored wherever the tau of a picture is above 0, as in the code; `anchored` says otherwise.
- The means and deviations of the colours are the family's (the code has 0.5 for all); the processor's, where it is at
  hand. Pixels are compared as the model is given them: in bf16 unequal ones may have become equal.
- Of an image the first of a patch's two moments counts (code). The code fails on videos: here each step of a video is a
  picture of its own, of which both moments count.
- Crops of one image (LLaVA-NeXT) are pictures of their own, each with its share of the cap.
- Towers with windows (Qwen2.5-VL) and towers of one size (CLIP, SigLIP), which the code does not cover, work too.
- Positions of the text after a picture are those of the unpruned prompt (the code's for transformers; its vLLM plug-in
  moves the text forward).
- Left out: the code's other selectors (run length, serpentine, components), which are ablations, and its drop behind a
  block of the tower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, refuse_nan
from tokenprune.interfaces.signals import TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.registry import register_method

METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda difference: difference.abs().amax(dim=-1),
    "mae": lambda difference: difference.abs().mean(dim=-1),
    "rmse": lambda difference: difference.square().mean(dim=-1).sqrt(),
}
_HALVINGS = 12  # 1/4096 of the range: finer than the steps of 8-bit pixels


def neighbours(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Cells to the left, above, and above to the left of each cell but the first, `[N - 1]` int64 each.

    In row 0 all are the one to the left, in column 0 the one above: the prediction is that one then, whatever is alike.
    """
    cols = grid[1]
    cell = torch.arange(1, grid[0] * cols, device=device)
    first_row, first_col = cell < cols, cell % cols == 0
    left = torch.where(first_col, cell - cols, cell - 1)
    above = torch.where(first_row, cell - 1, cell - cols)
    corner = torch.where(first_row | first_col, left, cell - cols - 1)
    return left, above, corner


def kept_sliding(pixels: Tensor, grid: tuple[int, int], metric: str) -> Callable[[Tensor], Tensor]:
    """From tau `[M]` to the cells that stay, `[M, N]` bool, where neighbours are the picture's own.

    Args:
        pixels: `[M, N, P]` fp32.
    """
    left, above, corner = neighbours(grid, pixels.device)
    own = torch.arange(1, pixels.shape[1], device=pixels.device)

    def distance(one: Tensor, other: Tensor) -> Tensor:
        return METRICS[metric](pixels[:, one] - pixels[:, other])  # [M, N - 1]

    corner_left, corner_above = distance(corner, left), distance(corner, above)
    from_left, from_above = distance(own, left), distance(own, above)
    first = torch.ones(len(pixels), 1, dtype=torch.bool, device=pixels.device)

    def kept(tau: Tensor) -> Tensor:
        limit = tau[:, None]
        by_above = (corner_left <= limit) & ~(corner_above <= limit)
        alike = torch.where(by_above, from_above, from_left) <= limit
        return torch.cat([first, ~alike], dim=1)

    return kept


def kept_anchored(pixels: Tensor, grid: tuple[int, int], metric: str) -> Callable[[Tensor], Tensor]:
    """The same where neighbours are what a decoder would have there.

    That is some cell's own pixels, so it is told which cell's. Cells of an anti-diagonal wait for those of the two
    before it only, and are done together.
    """
    (rows, cols), device = grid, pixels.device
    left, above, corner = neighbours(grid, device)
    images = torch.arange(len(pixels), device=device)[:, None]

    def kept(tau: Tensor) -> Tensor:
        limit = tau[:, None]
        source = torch.arange(rows * cols, device=device).repeat(len(pixels), 1)  # [M, N]
        stays = torch.ones_like(source, dtype=torch.bool)
        for diagonal in range(1, rows + cols - 1):
            row = torch.arange(max(0, diagonal - cols + 1), min(rows - 1, diagonal) + 1, device=device)
            cell = row * cols + diagonal - row  # [d]
            a, b, c = (source[:, near[cell - 1]] for near in (left, above, corner))  # [M, d]
            pixels_a, pixels_b, pixels_c = (pixels[images, cells] for cells in (a, b, c))  # [M, d, P]
            distance = METRICS[metric]
            by_above = (distance(pixels_c - pixels_a) <= limit) & ~(distance(pixels_c - pixels_b) <= limit)
            predicted = torch.where(by_above, b, a)
            alike = distance(pixels[:, cell] - pixels[images, predicted]) <= limit
            source = source.index_copy(1, cell, torch.where(alike, predicted, cell))
            stays = stays.index_copy(1, cell, ~alike)
        return stays

    return kept


@register_method("pixelprune")
@dataclass
class PixelPrune(Pruner):
    """Chooses among the cells of a picture by their pixels `[M, N, P]`; `keep` is the most that may stay.

    Attributes:
        tau: the largest distance at which cells are alike, pixels being 0..1; at least 0. JPEG noise wants some 0.02 to
            0.05 (a guess).
        metric: of the differences of two cells, "max", "mae" (mean of their absolutes) or "rmse".
        anchored: whether neighbours are what a decoder would have there. None: where tau is above 0.
        mean, std: what the image processor normalised red, green and blue with (pixels in 0..1), which the model does
            not know; None is what the family's published processors take. At tau = 0 they change nothing.
    """

    site: ClassVar[str] = "pixels"
    cuts_pixels: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True
    published_positions: ClassVar[str] = "keep"
    published: ClassVar[str] = "arXiv 2604.00886, OPPO-Mente-Lab/PixelPrune"
    reproduces: ClassVar[str] = (
        "Qwen3-VL on documents and screens: 22 to 71 % of patches are unique in their pixels (abstract)"
    )
    processor_options: ClassVar[dict[str, str]] = {"mean": "image_mean", "std": "image_std"}

    tau: float = 0.0
    metric: str = "max"
    anchored: bool | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tau < math.inf:
            raise ValueError(f"tau must be a distance of pixels from 0 on, got {self.tau!r}.")
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}.")
        if self.anchored not in (None, True, False):
            raise ValueError(f"anchored must be true or false, got {self.anchored!r}.")
        for name in ("mean", "std"):
            colours = getattr(self, name)
            if colours is not None and len(colours) != 3:
                raise ValueError(f"{name} must be three numbers, for red, green and blue, got {colours!r}.")

    def notes(self, tower: TowerInfo) -> tuple[str, ...]:
        if self.tau > 0 and self.std is None:
            return ("distances by the pixel normalisation of the family's published processors",)
        return ()

    def levels(self, view: View) -> Tensor:
        """`[M, N, P]` fp32: the pixels before normalisation."""
        by_colour = view.features.float().unflatten(-1, (3, -1))
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=by_colour.device)[:, None]
            for values in (self.mean or view.tower.pixel_mean, self.std or view.tower.pixel_std)
        )
        return (by_colour * std + mean).flatten(-2)

    def select(self, view: View) -> Selection:
        pixels, grid = self.levels(view), view.grid
        refuse_nan(pixels)
        tau = torch.full((len(pixels),), self.tau, dtype=torch.float32, device=pixels.device)
        anchors = self.anchored is not False
        # at tau = 0 both are one, and this one is fast
        now = kept_anchored if anchors and self.tau > 0 else kept_sliding
        stays = now(pixels, grid, self.metric)(tau)
        counts: list[int] = stays.sum(dim=1).tolist()
        if max(counts) > view.budget:
            capped = (kept_anchored if anchors else kept_sliding)(pixels, grid, self.metric)
            stays = self._under_cap(capped, pixels, tau, stays.sum(dim=1) <= view.budget, view.budget)
            counts = stays.sum(dim=1).tolist()
        cells = torch.arange(pixels.shape[1], device=pixels.device)
        kept = torch.where(stays, cells, len(cells)).sort(dim=1).values[:, : max(counts)]
        return Selection(kept.clamp_max(len(cells) - 1), counts=counts)

    @staticmethod
    def _under_cap(kept: Callable[[Tensor], Tensor], pixels: Tensor, low: Tensor, fits: Tensor, budget: int) -> Tensor:
        """`[M, N]` bool: what stays at the least tau found at which no more than `budget` cells do.

        Args:
            kept: from tau `[M]` to the cells that stay.
            low: `[M]`, the tau to begin with.
            fits: `[M]` bool, pictures in which no more do at that one, which keep it.
        """
        # no distance is above the range of a picture's values (a little more for the rounding of means): all cells are
        # alike there, and the first stays alone
        flat = pixels.flatten(1)
        whole = torch.maximum(1.001 * (flat.amax(dim=1) - flat.amin(dim=1)), low)
        high = torch.where(fits, low, whole)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            under = kept(middle).sum(dim=1) <= budget
            low, high = torch.where(under, low, middle), torch.where(under, middle, high)
        return kept(high)
