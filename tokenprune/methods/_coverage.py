"""Greedy selection by coverage: how much of what is to be seen some chosen token is like (facility location).

Coverage of a token u by the chosen ones is m_u = max over them of cos(u, s), 0 with none and for negative ones; what v
would add is the sum over u of max(0, cos(u, v) - m_u). That never grows as tokens are chosen, so on a CPU, where gains
are computed one column at a time, a token is looked at again only when its last gain would win (lazy greedy). Choices
are those of plain greedy, ties included. They are nested: the first j of k are the choice for a budget of j.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

_CELLS = 1 << 26  # numbers of a table of gains at a time, on devices that take all tokens at once


def cosines(features: Tensor) -> Tensor:
    """`[M, N, N]` fp32 cosine similarities of `[M, N, D]`, at most 1, and 1 between a token and itself."""
    unit = normalize(features.float(), dim=2)
    table = (unit @ unit.transpose(1, 2)).clamp_max(1)
    table.diagonal(dim1=1, dim2=2).fill_(1)
    return table


def gains(table: Tensor, covered: Tensor) -> Tensor:
    """`[M, N]`: what each token would add, from cosines `[M, N, N]` and m `[M, N]`."""
    step = max(1, _CELLS // max(1, table.shape[0] * table.shape[2]))
    total = torch.zeros_like(covered)
    for start in range(0, table.shape[1], step):
        part = slice(start, start + step)
        total += (table[:, part] - covered[:, part, None]).clamp_min(0).sum(dim=1)
    return total


def greedy_coverage(table: Tensor, weights: Tensor, k: int, add: bool = False) -> Tensor:
    """Choose k tokens of each image, each the one with the highest gain times its weight (or plus it).

    Where all that is left has a product of 0, tokens that still add something come by their gain alone, and then the
    others by their weight (our choice).

    Args:
        table: `[M, N, N]` cosines, see `cosines`.
        weights: `[M, N]` fp32, from 0 on.
        k: 1 <= k <= N.
        add: gain plus weight in place of their product.

    Returns:
        `[M, k]` int64 in the order of choice; ties go to the lower index.
    """
    if table.device.type == "cpu":
        rows = zip(table.numpy(), weights.float().numpy(), strict=True)
        return torch.from_numpy(np.stack([_lazy(one, weight, k, add) for one, weight in rows]))
    return _plain(table, weights, k, add)


def _lazy(table: np.ndarray, weights: np.ndarray, k: int, add: bool) -> np.ndarray:
    """One image; `table` is symmetric, so a row of it is a column."""
    covered = np.zeros(len(table), dtype=np.float32)
    last = np.maximum(table, 0).sum(axis=1, dtype=np.float32)  # gains when they were last looked at
    seen = np.zeros(len(table), dtype=np.int64)
    free = np.ones(len(table), dtype=bool)

    def score(gain: np.ndarray) -> np.ndarray:
        return np.where(free, gain + weights if add else gain * weights, -1)

    order = np.empty(k, dtype=np.int64)
    for number in range(k):
        scores = score(last)
        best = int(scores.argmax())
        while seen[best] != number:
            last[best] = np.maximum(table[best] - covered, 0).sum(dtype=np.float32)
            seen[best] = number
            scores[best] = last[best] + weights[best] if add else last[best] * weights[best]
            best = int(scores.argmax())
        if not add and scores[best] <= 0:
            fresh = np.where(free, np.maximum(table - covered, 0).sum(axis=1, dtype=np.float32), -1)
            best = int(fresh.argmax() if fresh.max() > 0 else np.where(free, weights, -1).argmax())
        order[number], free[best] = best, False
        np.maximum(covered, table[best], out=covered)
    return order


def _plain(table: Tensor, weights: Tensor, k: int, add: bool) -> Tensor:
    """All images at once, without a read."""
    covered = torch.zeros_like(table[:, 0])
    taken = torch.zeros_like(covered, dtype=torch.bool)
    order = []
    for _ in range(k):
        gain = gains(table, covered)
        score = (gain + weights if add else gain * weights).masked_fill(taken, -1)
        if not add:
            gain, weight = gain.masked_fill(taken, -1), weights.masked_fill(taken, -1)
            second = torch.where(gain.amax(dim=1, keepdim=True) > 0, gain, weight)
            score = torch.where(score.amax(dim=1, keepdim=True) > 0, score, second)
        best = score.argmax(dim=1, keepdim=True)
        order.append(best)
        taken = taken.scatter(1, best, True)
        covered = torch.maximum(covered, table.gather(1, best[..., None].expand(-1, 1, table.shape[2]))[:, 0])
    return torch.cat(order, dim=1)


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
