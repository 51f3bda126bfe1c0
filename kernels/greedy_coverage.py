"""Greedy selection by coverage: how much of what is to be seen some chosen token is like (facility location).

Coverage of a token u by the chosen ones is m_u = max over them of cos(u, s), 0 with none and for negative ones; what v
would add is the sum over u of max(0, cos(u, v) - m_u), its gain. That never grows as tokens are chosen, so a token is
looked at again only when its last gain would win (lazy greedy). Choices are those of plain greedy, ties included:
rounded differences, and rounded sums of the same terms in the same order, never grow either. They are nested: the first
j of k are the choice for a budget of j.

On a CPU and in the kernel greedy is lazy; on a GPU all k steps of all images are one launch. `greedy_preservation`,
whose terms are scaled anew in each step, cannot be lazy and has no kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.kernels.dispatch import Op
from tokenprune.kernels.launch import Kernel, power_of_two

if TYPE_CHECKING:
    import triton.language as tl

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
        table: `[M, N, N]` fp32 cosines, see `cosines`; symmetric, a row is read as a column.
        weights: `[M, N]`, any float dtype, from 0 on; ranked in fp32.
        k: 1 <= k <= N.
        add: gain plus weight in place of their product.

    Returns:
        `[M, k]` int64 in the order of choice; ties go to the lower index.

    Raises:
        ValueError: an argument is out of range.
    """
    if table.dim() != 3 or table.shape[1] != table.shape[2] or table.dtype != torch.float32:
        raise ValueError(f"greedy_coverage needs cosines [M, N, N] in fp32, got {table.dtype} {tuple(table.shape)}.")
    if weights.shape != table.shape[:2]:
        raise ValueError(f"weights must be [M, N] = {tuple(table.shape[:2])}, got {tuple(weights.shape)}.")
    if not 1 <= k <= table.shape[1]:
        raise ValueError(f"k must be from 1 to N = {table.shape[1]}, got {k}.")
    return _OP(table.detach(), weights.detach(), k, add)


def reference(table: Tensor, weights: Tensor, k: int, add: bool) -> Tensor:
    """`greedy_coverage` in NumPy, and in PyTorch on other devices than a CPU."""
    if table.device.type != "cpu":
        return _plain(table, weights.float(), k, add)
    chosen = torch.empty(len(table), k, dtype=torch.int64)
    for image, (one, weight) in enumerate(zip(table.numpy(), weights.float().numpy(), strict=True)):
        chosen[image] = torch.from_numpy(_lazy(one, weight, k, add))
    return chosen


def _lazy(table: np.ndarray, weights: np.ndarray, k: int, add: bool) -> np.ndarray:
    """One image; `table` is symmetric, so a row of it is a column."""
    covered = np.zeros(len(table), dtype=np.float32)
    last = np.maximum(table, 0).sum(axis=1, dtype=np.float32)  # gains when they were last looked at; -1 once chosen
    seen = np.zeros(len(table), dtype=np.int64)
    order = np.empty(k, dtype=np.int64)

    def winner(number: int, by_gain: bool) -> tuple[int, float]:
        """The free token that wins step `number`, and by what score."""
        scores = last if by_gain else last + weights if add else last * weights
        scores = np.where(last < 0, -1, scores)
        best = int(scores.argmax())
        while seen[best] != number:
            last[best] = gain = np.maximum(table[best] - covered, 0).sum(dtype=np.float32)
            seen[best] = number
            scores[best] = gain if by_gain else gain + weights[best] if add else gain * weights[best]
            best = int(scores.argmax())
        return best, scores[best]

    for number in range(k):
        best, score = winner(number, by_gain=False)
        if not add and score <= 0:
            best, score = winner(number, by_gain=True)
            if score <= 0:
                best = int(np.where(last < 0, -1, weights).argmax())
        order[number], last[best], seen[best] = best, -1, k
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


def launch(table: Tensor, weights: Tensor, k: int, add: bool) -> Tensor:
    images, count, _ = table.shape
    table, weights = table.contiguous(), weights.float().contiguous()
    gains_at_first = torch.empty(images, count, dtype=torch.float32, device=table.device)
    chosen = torch.empty(images, k, dtype=torch.int64, device=table.device)
    if images:
        block = power_of_two(count, 16)
        # the same warps in both: sums in the same order, so that a first gain bounds the later ones to the last bit
        warps = power_of_two(block // 512, 1, 16)
        first_gains_kernel[(count, images)](table, gains_at_first, count, block, num_warps=warps)
        steps_kernel[(images,)](table, weights, gains_at_first, chosen, count, k, add, block, num_warps=warps)
    return chosen


@Kernel
def first_gains_kernel(p_table, p_gains, count, BLOCK: tl.constexpr):
    """What one token of one image covers alone."""
    token, image = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    row = tl.load(p_table + (image * count + token) * count + o_n, mask=o_n < count, other=0.0)
    tl.store(p_gains + image * count + token, tl.sum(tl.maximum(row, 0.0), axis=0))


@Kernel
def steps_kernel(p_table, p_weights, p_gains, p_chosen, count, k, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """All k steps of one image by lazy greedy; what is covered and the last gains stay in registers.

    In a step the token that is ahead by its last gain is looked at, until the one ahead is the one just looked at. A
    gain of -1 marks chosen tokens and places behind the last. With NaN in the table the loops still end: a token that
    is looked at twice in a step has the same gain.
    """
    image = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    inside = o_n < count
    p_table += image * count * count
    p_chosen += image * k
    b_weights = tl.load(p_weights + image * count + o_n, mask=inside, other=0.0)
    b_last = tl.load(p_gains + image * count + o_n, mask=inside, other=-1.0)
    b_covered = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(0, k):
        fresh = count
        b_score = tl.where(b_last < 0, -1.0, b_last + b_weights if ADD else b_last * b_weights)
        # NaN must not lead out of the table
        best = tl.minimum(tl.argmax(b_score, axis=0, tie_break_left=True), count - 1)
        while best != fresh:
            row = tl.load(p_table + best.to(tl.int64) * count + o_n, mask=inside, other=0.0)
            b_last = tl.where(o_n == best, tl.sum(tl.maximum(row - b_covered, 0.0), axis=0), b_last)
            b_score = tl.where(b_last < 0, -1.0, b_last + b_weights if ADD else b_last * b_weights)
            fresh = best
            best = tl.minimum(tl.argmax(b_score, axis=0, tie_break_left=True), count - 1)
        if not ADD:  # noqa: SIM102  (a constant of the compiler, which cannot stand in one condition with a value)
            if tl.max(b_score, axis=0) <= 0:
                # nothing is gained times its weight: by the gain alone, and then by the weight
                fresh = count
                best = tl.minimum(tl.argmax(b_last, axis=0, tie_break_left=True), count - 1)
                while best != fresh:
                    row = tl.load(p_table + best.to(tl.int64) * count + o_n, mask=inside, other=0.0)
                    b_last = tl.where(o_n == best, tl.sum(tl.maximum(row - b_covered, 0.0), axis=0), b_last)
                    fresh = best
                    best = tl.minimum(tl.argmax(b_last, axis=0, tie_break_left=True), count - 1)
                if tl.max(b_last, axis=0) <= 0:
                    b_score = tl.where(b_last < 0, -1.0, b_weights)
                    best = tl.minimum(tl.argmax(b_score, axis=0, tie_break_left=True), count - 1)
        tl.store(p_chosen + step, best.to(tl.int64))
        row = tl.load(p_table + best.to(tl.int64) * count + o_n, mask=inside, other=0.0)
        b_covered = tl.maximum(b_covered, row)
        b_last = tl.where(o_n == best, -1.0, b_last)


def _fake(table: Tensor, weights: Tensor, k: int, add: bool) -> Tensor:
    return table.new_empty(table.shape[0], k, dtype=torch.int64)


_OP = Op(
    "greedy_coverage(Tensor table, Tensor weights, int k, bool add) -> Tensor",
    reference,
    launch,
    _fake,
)
