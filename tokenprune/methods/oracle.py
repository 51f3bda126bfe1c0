"""Keeps the tokens that the answer depends on: an upper bound for tasks whose object boxes are known.

Paper: none; a baseline from above that shows the headroom of other methods (our choice throughout).
Official code: none.
Licence: none needed, written for this library.
Deviations: none, there is nothing to deviate from. Only tasks that come with boxes can use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, topk_indices
from tokenprune.interfaces.view import View
from tokenprune.methods._places import spread
from tokenprune.registry import register_method

_TOUCH = 1e-4  # of a patch: a box that ends on the border of a patch does not touch it, even if rounded to fp32


def coverage(boxes: Sequence[Sequence[float]], grid: tuple[int, int]) -> Tensor:
    """How much of each patch the boxes cover, in patches; overlapping boxes count twice.

    Args:
        boxes: `[x0, y0, x1, y1]` each, in fractions of the image's width and height, x to the right and y down.
        grid: (rows, cols) of patches.

    Returns:
        `[rows * cols]` fp64, raster order.

    Raises:
        ValueError: a box is not four numbers with x0 < x1 and y0 < y1.
    """
    corners = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4) if all(len(box) == 4 for box in boxes) else None
    if corners is None or not bool((corners[:, :2] < corners[:, 2:]).all()):
        raise ValueError(f"A box is [x0, y0, x1, y1] with x0 < x1 and y0 < y1, in fractions of the image; got {boxes}.")

    def along(low: Tensor, high: Tensor, count: int) -> Tensor:
        edges = torch.arange(count, dtype=torch.float64)
        return (torch.minimum(high * count, edges + 1) - torch.maximum(low * count, edges)).clamp_min(0)

    rows = along(corners[:, 1:2], corners[:, 3:4], grid[0])  # [boxes, rows]
    cols = along(corners[:, 0:1], corners[:, 2:3], grid[1])  # [boxes, cols]
    return (rows.unsqueeze(2) * cols.unsqueeze(1)).sum(dim=0).flatten()


def keep_covered(boxes: Sequence[Sequence[float]], grid: tuple[int, int], k: int) -> Tensor:
    """`[k]` int64, sorted: patches that a box touches, the most covered first, then an even spread of the others."""
    covered = coverage(boxes, grid)
    wanted = covered > _TOUCH
    missing = k - int(wanted.sum())
    if missing <= 0:
        return topk_indices(covered.unsqueeze(0), k).squeeze(0)
    # the smallest even spread that has enough places outside the boxes, then an even part of these
    size = missing
    while True:
        places = spread(grid, size)
        others = places[~wanted[places]]
        if len(others) >= missing:
            break
        size = min(size + missing - len(others), wanted.numel())
    steps = torch.arange(missing)
    wanted[others[(2 * steps + 1) * len(others) // (2 * missing)]] = True
    return wanted.nonzero().squeeze(1)


@register_method("oracle")
@dataclass
class Oracle(Pruner):
    """Keeps the patches that the boxes touch first; if these are more than k, those covered most.

    Needs `hints["boxes"]`: for each image a list of boxes `[x0, y0, x1, y1]` in fractions (0 to 1) of the image's width
    and height; an empty list means an even spread. It has no options of its own.
    """

    hints: ClassVar[tuple[str, ...]] = ("boxes",)
    needs_grid: ClassVar[bool] = True
    published: ClassVar[str] = "upper bound, no paper"

    def select(self, view: View) -> Selection:
        boxes = view.hints.get("boxes")
        if boxes is None or len(boxes) != view.num_images:
            raise ValueError(
                f"oracle needs hints['boxes'], one list of boxes for each of the {view.num_images} images, got "
                f"{'none' if boxes is None else len(boxes)}."
            )
        kept = [keep_covered(image_boxes, view.grid, view.budget) for image_boxes in boxes]
        return Selection(torch.stack(kept).to(view.features.device))
