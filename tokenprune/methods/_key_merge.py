"""What PruMerge and PruMerge+ share: which tokens stand out, and what a kept token takes of those with like keys."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.interfaces.selection import topk_indices

NEIGHBOURS = 32
"""Tokens whose keys are most similar, that are added to a kept one (code)."""


def outliers(attention: Tensor) -> Tensor:
    """`[M]` int64: floor(N x the share of values above Q3 + 1.5 (Q3 - Q1)), of each row of `[M, N]`; the quartiles are
    interpolated linearly."""
    first, third = torch.quantile(attention, torch.tensor([0.25, 0.75], device=attention.device), dim=1)  # [M] each
    return (attention > (third + 1.5 * (third - first))[:, None]).sum(dim=1)


def add_neighbours(features: Tensor, keys: Tensor, attention: Tensor, kept: Tensor, neighbours: int) -> Tensor:
    """x_i + sum of a_j x_j over the tokens j whose keys are most similar to that of i.

    Args:
        features: `[M, N, D]`, any float dtype.
        keys: `[M, N, C]` fp32.
        attention: `[M, N]` fp32, a.
        kept: `[M, k]` int64, i.
        neighbours: how many, at most N - 1; ties go to the lower index.

    Returns:
        `[M, k, D]` in the dtype of `features`; sums are taken in fp32.
    """
    images, count, _ = features.shape
    own = features.gather(1, kept[..., None].expand(-1, -1, features.shape[2]))
    width = min(neighbours, count - 1)
    if width == 0:
        return own
    unit = normalize(keys, dim=2)
    mine = unit.gather(1, kept[..., None].expand(-1, -1, keys.shape[2]))
    alike = mine @ unit.transpose(1, 2)  # [M, k, N]
    alike = alike.scatter(2, kept[..., None], -torch.inf)
    nearest = topk_indices(alike.flatten(0, 1), width).view(images, -1, width)  # [M, k, w]
    total = own.float()
    for number in range(width):
        index = nearest[:, :, number]
        neighbour = features.gather(1, index[..., None].expand_as(total)).float()
        total = total + attention.gather(1, index)[..., None] * neighbour
    return total.to(features.dtype)


def add_neighbours_flops(num_images: int, num_tokens: int, keep: int, key_width: int, neighbours: int) -> int:
    """Matrix products of `add_neighbours`: none where nothing is added."""
    if min(neighbours, num_tokens - 1) == 0:
        return 0
    return 2 * num_images * num_tokens * keep * key_width
