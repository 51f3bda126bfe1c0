"""Greedy selection of mutually dissimilar tokens: max-sum diversification and k-center (farthest point).

Both start from one token and then add, k - 1 times, the token that is least similar to those chosen: by the sum of its
cosine similarities to them ("max_sum") or by the largest of these ("k_center"). The similarities come from one Gram
product of N x N, or, where k is small beside N, from one matrix-vector product a step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

OBJECTIVES = ("max_sum", "k_center")

_TINY = 1e-12  # rows shorter than this are padding: they become zero vectors instead of NaN

# One row of similarities at a time reads all features anew; the full Gram product reuses them from cache. Measured on
# one core (AVX-512, N = 576, D = 256, 1024 and 4096), a row alone costs 12 times a row of the product.
_ROW_COST = 12


def needs_gram(num_tokens: int, k: int, has_first: bool) -> bool:
    """Whether all N x N similarities are formed: yes unless k is small beside N and the first token is given."""
    return not has_first or _ROW_COST * k > num_tokens


def greedy_diversity_flops(num_images: int, num_tokens: int, width: int, k: int, has_first: bool) -> int:
    """Floating-point operations of the matrix products in `greedy_diversity`, 2 per multiply-add."""
    rows = num_tokens if needs_gram(num_tokens, k, has_first) else k - 1
    return 2 * num_images * rows * num_tokens * width


def greedy_diversity(features: Tensor, k: int, objective: str, first: Tensor | None = None) -> Tensor:
    """Choose k tokens of each image, every one the least similar to those chosen before it.

    Similarity is the cosine, in fp32; equal values go to the lower index. Costs 2 N^2 D floating-point operations and
    N^2 numbers of memory an image (2 (k - 1) N D and O(N) where `needs_gram` says no), then k steps of O(N).

    Args:
        features: `[M, N, D]`, any float dtype; rows need not be normalised, and a row of zeros is similar to nothing.
        k: tokens to choose, 1 <= k <= N.
        objective: "max_sum" takes the token with the smallest sum of similarities to the chosen ones, "k_center" the
            one whose largest similarity to a chosen one is smallest.
        first: `[M]` int64, the token that each image starts from; None starts from the token whose nearest neighbour
            is farthest.

    Returns:
        `[M, k]` int64 in the order of choice, without duplicates.

    Raises:
        ValueError: an argument is out of range, or (CPU tensors, where looking is free) a feature is NaN or infinite.
    """
    if features.dim() != 3 or not 1 <= k <= features.shape[1]:
        raise ValueError(
            f"greedy_diversity needs features [M, N, D] and 1 <= k <= N, got {tuple(features.shape)} and k={k}."
        )
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}.")
    if first is not None and (first.shape != features.shape[:1] or first.dtype != torch.int64):
        raise ValueError(f"first must be int64 [{features.shape[0]}], got {first.dtype} {tuple(first.shape)}.")
    on_cpu = features.device.type == "cpu"
    unit = features.detach().float()
    norms = torch.linalg.vector_norm(unit, dim=2, keepdim=True)
    if on_cpu:
        if not bool(norms.isfinite().all()):
            raise ValueError(
                "Features hold NaN or infinity, so they rank nothing. Check the model's weights and input."
            )
        if first is not None and not bool(((first >= 0) & (first < features.shape[1])).all()):
            raise ValueError(f"first must be in [0, {features.shape[1]}), got {first.tolist()}.")
    unit = unit / norms.clamp_min(_TINY)
    return _one_by_one(unit, k, objective, first) if on_cpu else _batched(unit, k, objective, first)


def _one_by_one(unit: Tensor, k: int, objective: str, first: Tensor | None) -> Tensor:
    """For CPU tensors: image by image, so that a batch gives the very bits of its images alone.

    The steps run in NumPy on the tensors' own memory, because a step is two operations on N numbers, and for so few
    NumPy takes 1.5 us where starting the operations of PyTorch takes 20.
    """
    num_images, num_tokens, _ = unit.shape
    chosen = torch.empty(num_images, k, dtype=torch.int64)
    has_gram = needs_gram(num_tokens, k, first is not None)
    gram = torch.empty(num_tokens if has_gram else 0, num_tokens)
    row = torch.empty(num_tokens, 1)
    rows, one_row = gram.numpy(), row.numpy()[:, 0]
    join = np.add if objective == "max_sum" else np.maximum
    for image in range(num_images):
        x, out = unit[image], chosen[image].numpy()
        if has_gram:
            torch.mm(x, x.T, out=gram)
        if first is None:
            place = int(gram.fill_diagonal_(-torch.inf).amax(dim=1).argmin())
        else:
            place = int(first[image])
        if has_gram:
            # a chosen token leaves the race by its own similarity: infinity survives both addition and maximum
            gram.fill_diagonal_(torch.inf)
        out[0] = place
        total = np.full(num_tokens, 0 if objective == "max_sum" else -np.inf, dtype=np.float32)
        for step in range(1, k):
            if has_gram:
                join(total, rows[place], out=total)
            else:
                torch.mm(x, x[place].unsqueeze(1), out=row)
                join(total, one_row, out=total)
                total[place] = np.inf
            # NumPy documents that the first of equal values wins, as PyTorch does
            out[step] = place = int(total.argmin())
    return chosen


def _batched(unit: Tensor, k: int, objective: str, first: Tensor | None) -> Tensor:
    """For any device: all images at once, and no value is read back to the host."""
    num_images, num_tokens, width = unit.shape
    if has_gram := needs_gram(num_tokens, k, first is not None):
        table = torch.bmm(unit, unit.transpose(1, 2))
        diagonal = table.diagonal(dim1=1, dim2=2)
        if first is None:
            diagonal.fill_(-torch.inf)
            first = table.amax(dim=2).argmin(dim=1)
        diagonal.fill_(torch.inf)
    else:
        table = unit
    table = table.flatten(0, 1)
    start = torch.arange(0, num_images * num_tokens, num_tokens, device=unit.device)
    total = unit.new_full((num_images, num_tokens), 0 if objective == "max_sum" else -torch.inf)
    chosen = torch.empty(num_images, k, dtype=torch.int64, device=unit.device)
    place = first if first is not None else start  # `first` is set by now; the type checker cannot see it
    chosen[:, 0] = place
    for step in range(1, k):
        row = table.index_select(0, start + place)
        if not has_gram:
            row = torch.bmm(unit, row.unsqueeze(2)).squeeze(2)
        total = torch.add(total, row, out=total) if objective == "max_sum" else torch.maximum(total, row, out=total)
        if not has_gram:
            total.scatter_(1, place.unsqueeze(1), torch.inf)
        place = total.argmin(dim=1)
        chosen[:, step] = place
    return chosen
