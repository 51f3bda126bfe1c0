"""Which visual tokens stay, and the one top-k that every method shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.kernels.segmented_topk import segmented_topk


@dataclass
class Selection:
    """The outcome of a method for M images that have N visual tokens each.

    Attributes:
        indices: `[M, k]` int64, kept visual tokens, as places among the image's N, strictly increasing.
        features: `[M, k, D]` or None: embeddings that replace those of the kept tokens (methods that merge). None means
            the kept tokens go on unchanged, bit for bit.
        counts: `[M]` ints, for methods that decide by image how many stay: image m keeps its first `counts[m]` indices
            and features (the rest of its rows is not looked at). None means k for each.
        carry: name -> `[M, N]`, values of all tokens that were chosen among; those of the kept ones travel with them to
            the next stage of the prompt (`View.carry`).
        sizes: `[M, k]` or None: how many tokens each kept one stands for, itself counted, at least 1; from methods that
            merge. Not whole where a method weighs what it merged (ERA).
        merged: `[M]` or None: how many of the tokens that leave went into kept ones, for reports. None takes it from
            `sizes`: their sum, less the kept tokens themselves.
    """

    indices: Tensor
    features: Tensor | None = None
    counts: list[int] | None = None
    carry: dict[str, Tensor] | None = None
    sizes: Tensor | None = None
    merged: Tensor | None = None

    def validate(self, count: int, num_tokens: int, least: int = 1) -> Selection:
        """Check shape, range and order of a selection among `num_tokens` tokens of `count` images; return self.

        The range check reads values back from the device, so it runs on CPU tensors only, where it is free.

        Raises:
            ValueError: the indices are not `[count, k]` int64, sorted, unique and in `[0, num_tokens)`.
        """
        indices = self.indices
        if indices.dim() != 2 or indices.shape[0] != count or indices.dtype != torch.int64:
            raise ValueError(
                f"A selection needs int64 indices of shape [{count}, k], got {indices.dtype} {tuple(indices.shape)}."
            )
        if not least <= indices.shape[1] <= num_tokens:
            raise ValueError(f"A selection must keep {least} to {num_tokens} tokens, got {indices.shape[1]}.")
        if self.counts is not None:
            self._check_counts(count, least)
        if self.features is not None and self.features.shape[:2] != indices.shape:
            raise ValueError(
                f"Merged features must be [M, k, D] with M, k = {tuple(indices.shape)}, "
                f"got {tuple(self.features.shape)}."
            )
        if self.sizes is not None and self.sizes.shape != indices.shape:
            raise ValueError(
                f"Sizes of kept tokens must be [M, k] = {tuple(indices.shape)}, got {tuple(self.sizes.shape)}."
            )
        if indices.device.type == "cpu":
            increasing, inside = indices.diff(dim=1) > 0, (indices >= 0) & (indices < num_tokens)
            if self.counts is not None:
                unread = torch.arange(indices.shape[1]) >= torch.tensor(self.counts)[:, None]
                increasing, inside = increasing | unread[:, 1:], inside | unread
            if not bool(inside.all()) or not bool(increasing.all()):
                raise ValueError(
                    f"Selected indices must be strictly increasing and in [0, {num_tokens}); got {indices.tolist()}."
                )
        return self

    def _check_counts(self, count: int, least: int) -> None:
        counts = self.counts or []
        if len(counts) != count or not all(least <= k <= self.indices.shape[1] for k in counts):
            raise ValueError(
                f"A selection needs one count per image, each from {least} to {self.indices.shape[1]}, got {counts}."
            )


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """The k highest scores of each row, as sorted indices; ties go to the lower index on every device.

    Args:
        scores: `[M, N]`, any float dtype; higher means keep. NaN is refused (see raises).
        k: how many to keep, 1 <= k <= N.

    Returns:
        `[M, k]` int64, strictly increasing along the last dimension.

    Raises:
        ValueError: k out of range, or (CPU tensors, where looking is free) a NaN among the scores.
    """
    if scores.dim() != 2 or not 1 <= k <= scores.shape[1]:
        raise ValueError(f"topk_indices needs scores [M, N] and 1 <= k <= N, got {tuple(scores.shape)} and k={k}.")
    refuse_nan(scores)
    return segmented_topk(scores, [scores.shape[1]], None, k)


def refuse_nan(scores: Tensor) -> None:
    """Raise ValueError if there is a NaN among scores on the CPU; on a device the check would cost a read."""
    if scores.is_floating_point() and scores.device.type == "cpu" and bool(scores.isnan().any()):
        raise ValueError("Scores hold NaN, so they rank nothing. Check the model's weights and its input for NaN.")


def fit_grid(grid: tuple[int, int], budget: int) -> tuple[int, int]:
    """The largest raster of at most `budget` cells that keeps the shape of `grid` within 4:3 (our choice).

    24 x 24 gives 8 x 8 for 64, 11 x 11 for 128 and 12 x 16 for 192. Among equals the less distorted one wins, then the
    one with fewer rows. Used by methods whose kept tokens form a raster (pool, downsample): they keep rows * cols
    tokens, which may be less than the budget.
    """
    rows, cols = grid
    best: tuple[int, float, int] | None = None
    result = (1, 1)
    for height in range(1, min(rows, budget) + 1):
        for width in range(1, min(cols, budget // height) + 1):
            distortion = max(height * cols / (width * rows), width * rows / (height * cols))
            # one row or one column more may be the only way to use a tiny budget
            if distortion > 4 / 3 + 1e-9 and height * width > 4:
                continue
            rank = (height * width, -distortion, -height)
            if best is None or rank > best:
                best, result = rank, (height, width)
    return result


def grid_places(grid: tuple[int, int], small: tuple[int, int]) -> list[int]:
    """Raster indices in `grid` of the cells of the smaller raster `small`: the place nearest each cell's
    centre, unique and increasing."""
    rows, cols = grid
    height, width = small
    if not (1 <= height <= rows and 1 <= width <= cols):
        raise ValueError(f"A raster of {height} x {width} does not fit into one of {rows} x {cols}.")
    return [
        int((i + 0.5) * rows / height) * cols + int((j + 0.5) * cols / width)
        for i in range(height)
        for j in range(width)
    ]
