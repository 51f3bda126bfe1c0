"""Keeps the tokens that the answer depends on, as the boxes of a task say: a reference that is told where to look.

Paper: none; a baseline that is told the answer, it shows the headroom of other methods (our choice throughout).
Official code: none.
Licence: none needed, written for this library.
Deviations: none, there is nothing to deviate from. Only tasks that come with boxes can use it.

It is no upper bound. It keeps what suffices and fills the rest of the budget without knowing what helps the model, so a
method that keeps a better rest can beat it. `fill="diversity"` fills with the tokens that are least like those kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, topk_indices
from tokenprune.interfaces.signals import TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.kernels.greedy_diversity import greedy_diversity
from tokenprune.methods._places import spread
from tokenprune.registry import near, register_method

FILLS = ("spread", "diversity")

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


def keep_covered_and_diverse(
    boxes: Sequence[Sequence[float]], grid: tuple[int, int], features: Tensor, k: int
) -> Tensor:
    """`[k]` int64, sorted: patches that a box touches, the most covered first, then, again and again, the one whose
    largest cosine to those kept is smallest; ties go to the lower index.

    Args:
        features: `[N, D]`, on any device; the result is on the CPU.
    """
    covered = coverage(boxes, grid)
    wanted = covered > _TOUCH
    missing = k - int(wanted.sum())
    if missing <= 0:
        return topk_indices(covered.unsqueeze(0), k).squeeze(0)
    if missing == k:
        return greedy_diversity(features[None], k, "k_center")[0].cpu().sort().values
    unit = normalize(features.float(), dim=1).cpu()
    nearest = (unit @ unit[wanted].T).amax(dim=1)
    for _ in range(missing):
        place = int(nearest.masked_fill(wanted, torch.inf).argmin())
        wanted[place] = True
        nearest = torch.maximum(nearest, (unit @ unit[place, None].T)[:, 0])  # a product that FLOP counters count
    return wanted.nonzero().squeeze(1)


@register_method("oracle")
@dataclass
class Oracle(Pruner):
    """Keeps the patches that the boxes touch first; if these are more than k, those covered most.

    Needs `hints["boxes"]`: for each image a list of boxes `[x0, y0, x1, y1]` in fractions (0 to 1) of the image's width
    and height; an empty list means that all is filled.

    Attributes:
        fill: what the rest of the budget is filled with: "spread", evenly over the picture, or "diversity".
    """

    hints: ClassVar[tuple[str, ...]] = ("boxes",)
    needs_grid: ClassVar[bool] = True
    published: ClassVar[str] = "reference, no paper"

    fill: str = "spread"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fill not in FILLS:
            raise ValueError(f"fill must be one of {', '.join(FILLS)}, got {self.fill!r}.{near(self.fill, FILLS)}")

    def select(self, view: View) -> Selection:
        boxes = view.hints.get("boxes")
        if boxes is None or len(boxes) != view.num_images:
            raise ValueError(
                f"oracle needs hints['boxes'], one list of boxes for each of the {view.num_images} images, got "
                f"{'none' if boxes is None else len(boxes)}."
            )
        if self.fill == "spread":
            kept = [keep_covered(image_boxes, view.grid, view.budget) for image_boxes in boxes]
        else:
            pairs = zip(boxes, view.features, strict=True)
            kept = [keep_covered_and_diverse(each, view.grid, rows, view.budget) for each, rows in pairs]
        return Selection(torch.stack(kept).to(view.features.device))

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        # of pictures whose boxes hold something and leave room; a picture that fills the budget alone needs none
        return 0 if self.fill == "spread" else 2 * num_images * num_tokens * width * keep
