"""Greedy selection by relevance, distance and coverage together (TOPS)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.kernels.greedy_coverage import gains


def greedy_preservation(
    table: Tensor, relevance: Tensor, k: int, diversity: float, coverage: float, by_mean: bool = True
) -> Tensor:
    """Choose k tokens of each image by a normalised sum of relevance, distance and coverage (TOPS).

    The first is the most relevant. Then, with m_i the largest cosine of i to a chosen token, the score of i is its
    relevance + diversity (1 - m_i) + coverage sum over tokens j not chosen of max(0, cos(i, j) - m_j), each term
    brought to a common scale over the tokens that are left, anew in each step.

    Args:
        table: `[M, N, N]` cosines, see `cosines`.
        relevance: `[M, N]` fp32.
        k: 1 <= k <= N.
        diversity, coverage: weights, alpha and lambda.
        by_mean: each term is divided by its mean; False brings each to 0..1 by its extremes.

    Returns:
        `[M, k]` int64 in the order of choice; ties go to the lower index.
    """
    images, count, _ = table.shape
    taken = torch.zeros(images, count, dtype=torch.bool, device=table.device)
    best = relevance.argmax(dim=1, keepdim=True)
    order, nearest = [best], None
    for _ in range(k - 1):
        taken = taken.scatter(1, best, True)
        row = table.gather(1, best[..., None].expand(-1, 1, count))[:, 0]
        nearest = row if nearest is None else torch.maximum(nearest, row)
        terms = [relevance]
        if diversity:
            terms.append(diversity * _scaled((1 - nearest).clamp_min(0), taken, by_mean))
        if coverage:
            # chosen tokens are like themselves: nothing is added there
            terms.append(coverage * _scaled(gains(table, nearest.masked_fill(taken, 1)), taken, by_mean))
        terms[0] = _scaled(relevance, taken, by_mean)
        score = torch.stack(terms).sum(dim=0).masked_fill(taken, -torch.inf)
        best = score.argmax(dim=1, keepdim=True)
        order.append(best)
    return torch.cat(order, dim=1)


def _scaled(values: Tensor, taken: Tensor, by_mean: bool) -> Tensor:
    """`[M, N]` over those that are not taken: by their mean, or from 0 to 1; zeros where all are the same nothing."""
    if by_mean:
        left = (~taken).sum(dim=1, keepdim=True)
        mean = values.masked_fill(taken, 0).sum(dim=1, keepdim=True) / left
        return torch.where(mean > 1e-12, values / mean.clamp_min(1e-12), 0)
    low = values.masked_fill(taken, torch.inf).amin(dim=1, keepdim=True)
    high = values.masked_fill(taken, -torch.inf).amax(dim=1, keepdim=True)
    return torch.where(high > low, (values - low) / (high - low).clamp_min(1e-12), 0)
