"""Greedy selection by relevance, distance and coverage together (TOPS).

What a token would add changes only by the tokens that a new choice covers better than all before: about N / s of N in
step s, so a CPU updates it by their rows, N^2 log k in place of k N^2. Other devices take it anew, without a read.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tokenprune.kernels.greedy_coverage import cosines, gains

_ROWS = 256  # of a table at a time


def greedy_preservation(
    features: Tensor, relevance: Tensor, k: int, diversity: float, coverage: float, by_mean: bool = True
) -> Tensor:
    """Choose k tokens of each image by a normalised sum of relevance, distance and coverage.

    The first is the most relevant. Then, with m_i the largest cosine of i to a chosen token, the score of i is its
    relevance + diversity (1 - m_i) + coverage sum over tokens j not chosen of max(0, cos(i, j) - m_j), each term
    brought to a common scale over the tokens that are left, anew in each step. Takes N^2 numbers of memory: on a CPU
    for one image at a time (600 MB for 12288 tokens), elsewhere for all.

    Args:
        features: `[M, N, D]`, any float dtype.
        relevance: `[M, N]` fp32.
        k: 1 <= k <= N.
        diversity, coverage: weights, alpha and lambda.
        by_mean: each term is divided by its mean; False brings each to 0..1 by its extremes.

    Returns:
        `[M, k]` int64 in the order of choice; ties go to the lower index.
    """
    if features.device.type != "cpu":
        return _batched(cosines(features), relevance, k, diversity, coverage, by_mean)
    chosen = torch.empty(features.shape[0], k, dtype=torch.int64)
    for image in range(len(chosen)):
        table = cosines(features[image : image + 1].detach())[0].numpy()
        order = _one(table, relevance[image].double().numpy(), k, diversity, coverage, by_mean)
        chosen[image] = torch.from_numpy(order)
    return chosen


def _one(
    table: np.ndarray, relevance: np.ndarray, k: int, diversity: float, coverage: float, by_mean: bool
) -> np.ndarray:
    """One image; sums in fp64."""
    order = np.empty(k, dtype=np.int64)
    order[0] = place = int(relevance.argmax())
    free = np.ones(len(table), dtype=bool)
    nearest = np.full(len(table), -np.inf, dtype=np.float32)
    gain, covered = np.empty(0), nearest  # m, and 1 where a token is chosen: all that its row could add is 0 then
    for step in range(1, k):
        free[place] = False
        nearest = np.maximum(nearest, table[place])
        score = _scaled_row(relevance, free, by_mean)
        if diversity:
            score += diversity * _scaled_row(np.maximum(1 - nearest, 0), free, by_mean)
        if coverage:
            now = np.where(free, nearest, np.float32(1))
            gain = _gains(table, now) if step == 1 else gain - _lost(table, covered, now)
            covered = now
            score += coverage * _scaled_row(np.maximum(gain, 0), free, by_mean)
        order[step] = place = int(np.where(free, score, -np.inf).argmax())
    return order


def _gains(table: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """`[N]` fp64: what each token would add."""
    total = np.zeros(len(table))
    for start in range(0, len(table), _ROWS):
        part = slice(start, start + _ROWS)
        total += np.maximum(table[part] - covered[part, None], 0).sum(axis=0, dtype=np.float64)
    return total


def _lost(table: np.ndarray, before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """`[N]` fp64: by how much that has fallen, from the rows of tokens that are covered better."""
    total = np.zeros(len(table))
    changed = np.flatnonzero(now > before)
    for start in range(0, len(changed), _ROWS):
        part = changed[start : start + _ROWS]
        low, high = before[part, None], now[part, None]
        total += (np.clip(table[part], low, high).astype(np.float64) - low).sum(axis=0)
    return total


def _scaled_row(values: np.ndarray, free: np.ndarray, by_mean: bool) -> np.ndarray:
    """`[N]` fp64, as `_scaled`."""
    left = values[free].astype(np.float64)
    if by_mean:
        mean = left.mean()
        return values / mean if mean > 1e-12 else np.zeros(len(values))
    low, high = left.min(), left.max()
    return (values - low) / max(high - low, 1e-12) if high > low else np.zeros(len(values))


def _batched(table: Tensor, relevance: Tensor, k: int, diversity: float, coverage: float, by_mean: bool) -> Tensor:
    """For any device: all images at once, and no value is read back to the host."""
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
