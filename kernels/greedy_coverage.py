"""Greedy selection by coverage: how much of what is to be seen some chosen token is like (facility location).

Coverage of a token u by the chosen ones is m_u = max over them of cos(u, s), 0 with none and for negative ones; what v
would add is the sum over u of max(0, cos(u, v) - m_u). That never grows as tokens are chosen, so a token is looked at
again only when its last gain would win (lazy greedy): choices are those of plain greedy, ties included. On a GPU all k
steps of all images are one launch.
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
_WHOLE = 16384  # tokens; of more, a CPU computes rows of cosines when they are looked at: N^2 would be over 1 GB


def greedy_coverage_flops(num_images: int, num_tokens: int, width: int) -> int:
    """Floating-point operations of the matrix products, 2 per multiply-add: all cosines once. Above 16384 tokens a CPU
    computes those again that it looks at again, which depends on the picture and is not counted."""
    return 2 * num_images * num_tokens**2 * width


def cosines(features: Tensor) -> Tensor:
    """`[M, N, N]` fp32 cosine similarities of `[M, N, D]`, at most 1, and 1 between a token and itself, also one of
    zeros."""
    unit = normalize(features.float(), dim=2)
    table = (unit @ unit.transpose(1, 2)).clamp_max_(1)
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


def greedy_coverage(features: Tensor, weights: Tensor, k: int, add: bool = False) -> Tensor:
    """Choose k tokens of each image, each the one with the highest gain times its weight (or plus it).

    Where all that is left has a product of 0, tokens that still add something come by their gain alone, and then the
    others by their weight. Equal scores go to the lower index. Costs 2 N^2 D floating-point operations and N^2 numbers
    of memory (on a CPU for one image at a time, 600 MB for 12288 tokens, and none above 16384), then a few rows of N a
    step; at worst k steps of N^2. The first j of the k are the choice for a budget of j.

    Args:
        features: `[M, N, D]`, any float dtype; rows need not be normalised, and a row of zeros is like itself alone.
        weights: `[M, N]`, any float dtype, from 0 on.
        k: tokens to choose, 1 <= k <= N.
        add: gain plus weight in place of their product.

    Returns:
        `[M, k]` int64 in the order of choice, without duplicates.

    Raises:
        ValueError: an argument is out of range, or (CPU tensors, where looking is free) a feature is NaN or infinite,
            or a weight is below 0, NaN or infinite.
    """
    if features.dim() != 3 or not 1 <= k <= features.shape[1]:
        raise ValueError(
            f"greedy_coverage needs features [M, N, D] and 1 <= k <= N, got {tuple(features.shape)} and k={k}."
        )
    if weights.shape != features.shape[:2]:
        raise ValueError(f"weights must be {list(features.shape[:2])}, one a token, got {list(weights.shape)}.")
    return _OP(features.detach(), weights.detach().float(), k, add)


def reference(features: Tensor, weights: Tensor, k: int, add: bool) -> Tensor:
    """`greedy_coverage` in PyTorch and NumPy."""
    if features.device.type != "cpu":
        return _batched(cosines(features), weights, k, add)
    if not bool(features.isfinite().all()):
        raise ValueError("Features hold NaN or infinity, so they rank nothing. Check the model's weights and input.")
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError(f"Weights must be from 0 on and finite, got {float(weights.min())} to {float(weights.max())}.")
    chosen = torch.empty(features.shape[0], k, dtype=torch.int64)
    for image in range(features.shape[0]):  # one at a time: a batch gives the very bits of its images alone
        rows = _Rows(features[image])
        chosen[image] = torch.from_numpy(_lazy(rows, weights[image].numpy(), k, add))
    return chosen


class _Rows:
    """Rows of one image's cosines `[N, N]`, which are its columns: a table, or of many tokens what is asked for."""

    def __init__(self, features: Tensor) -> None:
        self.count = features.shape[0]
        self._table = cosines(features[None])[0].numpy() if self.count <= _WHOLE else None
        self._unit = normalize(features.float(), dim=1)

    def __getitem__(self, place: int) -> np.ndarray:
        if self._table is not None:
            return self._table[place]
        row = np.minimum((self._unit @ self._unit[place]).numpy(), 1)
        row[place] = 1
        return row

    def first_gains(self) -> np.ndarray:
        """`[N]`: what each token would add to nothing."""
        parts, step = [], max(1, _CELLS // 16 // self.count)
        for start in range(0, self.count, step):
            rows = slice(start, start + step)
            if self._table is not None:
                part = np.maximum(self._table[rows], 0)
            else:
                cut = (self._unit[rows] @ self._unit.T).clamp_(0, 1)
                cut.diagonal(start).fill_(1)
                part = cut.numpy()
            parts.append(part.sum(axis=1, dtype=np.float32))
        return np.concatenate(parts)


def _lazy(rows: _Rows, weights: np.ndarray, k: int, add: bool) -> np.ndarray:
    """One image."""
    covered = np.zeros(rows.count, dtype=np.float32)
    last = rows.first_gains()  # gains when they were last looked at
    seen = np.zeros(rows.count, dtype=np.int64)
    free = np.ones(rows.count, dtype=bool)
    by_gain = False  # once all products are 0: they stay it

    def scores() -> np.ndarray:
        score = last + weights if add else last if by_gain else last * weights
        return np.where(free, score, np.float32(-1))

    order = np.empty(k, dtype=np.int64)
    for number in range(k):
        score = scores()
        best = int(score.argmax())
        while True:
            if not add and not by_gain and score[best] <= 0:
                by_gain = True
                score = scores()
                best = int(score.argmax())
            elif seen[best] == number:
                break
            else:
                gain = np.maximum(rows[best] - covered, 0).sum(dtype=np.float32)
                last[best], seen[best] = gain, number
                score[best] = gain + weights[best] if add else gain if by_gain else gain * weights[best]
                best = int(score.argmax())
        if by_gain and score[best] <= 0:
            # nothing is added any more, by anything: by weight
            left = np.where(free, weights, np.float32(-1))
            order[number:] = np.argsort(-left, kind="stable")[: k - number]
            return order
        order[number], free[best] = best, False
        np.maximum(covered, rows[best], out=covered)
    return order


def _batched(table: Tensor, weights: Tensor, k: int, add: bool) -> Tensor:
    """For any device: all images at once, plain greedy, and no value is read back to the host."""
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


def launch(features: Tensor, weights: Tensor, k: int, add: bool) -> Tensor:
    images, count, _ = features.shape
    table, weights = cosines(features), weights.contiguous()
    chosen = torch.empty(images, k, dtype=torch.int64, device=features.device)
    first = torch.empty(images, count, dtype=torch.float32, device=features.device)
    block = power_of_two(count, 16)
    warps = power_of_two(block // 512, 1, 16)
    # with the block and warps of the steps, so that sums are taken in one order
    gains_kernel[(images, count)](table, first, count, block, num_warps=warps)
    steps_kernel[(images,)](table, weights, first, chosen, count, k, add, block, num_warps=warps)
    return chosen


@Kernel
def gains_kernel(p_table, p_first, count, BLOCK: tl.constexpr):
    """What one token would add to nothing."""
    image, token = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    row = tl.load(p_table + (image * count + token) * count + o_n, mask=o_n < count, other=0.0)
    tl.store(p_first + image * count + token, tl.sum(tl.maximum(row, 0.0), axis=0))


@Kernel
def steps_kernel(
    p_table, p_weights, p_first, p_chosen, count, k, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """All k steps of one image, lazily; gains, coverage and what is chosen stay in registers."""
    image = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    p_table += image * count * count
    p_chosen += image * k
    b_weights = tl.load(p_weights + image * count + o_n, mask=o_n < count, other=0.0)
    b_last = tl.load(p_first + image * count + o_n, mask=o_n < count, other=0.0)
    b_covered = tl.zeros([BLOCK], dtype=tl.float32)
    b_seen = tl.zeros([BLOCK], dtype=tl.int32)  # the step at which a gain was looked at; k where a token is chosen
    b_seen = tl.where(o_n < count, b_seen, k)
    rule = 0  # 0: gain and weight, 1: gain alone, 2: weight alone
    for step in range(k):
        place = 0
        open_to = 1
        while open_to == 1:
            if ADD:
                b_score = b_last + b_weights
            else:
                b_score = tl.where(rule == 0, b_last * b_weights, tl.where(rule == 1, b_last, b_weights))
            b_score = tl.where(b_seen == k, -1.0, b_score)
            top, place = tl.max(b_score, axis=0, return_indices=True, return_indices_tie_break_left=True)
            # NaN must lead neither out of the table nor to a loop without end
            place = tl.minimum(place, count - 1)
            age = tl.sum(tl.where(o_n == place, b_seen, 0), axis=0)
            nothing = (top > 0) == 0  # so that NaN is nothing
            if ADD:
                nothing = top != top
            if nothing & (rule < 2):
                rule += 1
            elif (rule == 2) | (age >= step):  # type: ignore
                open_to = 0
            else:
                row = tl.load(p_table + place.to(tl.int64) * count + o_n, mask=o_n < count, other=0.0)
                gain = tl.sum(tl.maximum(row - b_covered, 0.0), axis=0)
                b_last = tl.where(o_n == place, gain, b_last)
                b_seen = tl.where(o_n == place, step, b_seen)
        row = tl.load(p_table + place.to(tl.int64) * count + o_n, mask=o_n < count, other=0.0)  # type: ignore
        b_covered = tl.maximum(b_covered, row)
        b_seen = tl.where(o_n == place, k, b_seen)
        tl.store(p_chosen + step, place.to(tl.int64))  # type: ignore


def _fake(features: Tensor, weights: Tensor, k: int, add: bool) -> Tensor:
    return features.new_empty(features.shape[0], k, dtype=torch.int64)


def _flops(features: Tensor, weights: Tensor, k: int, add: bool) -> int:
    return greedy_coverage_flops(*features.shape)


_OP = Op(
    "greedy_coverage(Tensor features, Tensor weights, int k, bool add) -> Tensor", reference, launch, _fake, _flops
)
