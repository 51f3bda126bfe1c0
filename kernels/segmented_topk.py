"""Top-k inside segments: a quota for each crop, frame, image or strip of a row, with the row's order kept."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenprune.kernels.dispatch import Op
from tokenprune.kernels.launch import Kernel, on_device, power_of_two

if TYPE_CHECKING:
    import triton.language as tl

_EXACT_IN_FP32 = (torch.float16, torch.bfloat16, torch.float32, torch.uint8)


def segmented_topk(scores: Tensor, sizes: Sequence[int], quotas: Tensor | None, total: int) -> Tensor:
    """The highest scores of each segment, as sorted indices into the row; ties go to the lower index.

    Args:
        scores: `[M, N]`; higher means keep. A NaN ranks above everything, zero and minus zero tie. The kernel takes
            fp16, bf16, fp32 and uint8; other dtypes run the reference on every device.
        sizes: of the segments, which follow each other in every row; their sum is N.
        quotas: `[M, S]` int64, how many each segment of each row keeps, from 0 to its size. None, for one segment: it
            keeps `total`.
        total: K, the width of the result.

    Returns:
        `[M, K]` int64, strictly increasing along a row; -1 after the last where the quotas sum to less than K. Where
        they sum to more, the first K.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    sizes = list(sizes)
    if scores.dim() != 2 or sum(sizes) != scores.shape[1]:
        raise ValueError(
            f"segmented_topk needs scores [M, N] and segments that sum to N, got {tuple(scores.shape)} and {sizes}."
        )
    if quotas is None and (len(sizes) != 1 or not 1 <= total <= sizes[0]):
        raise ValueError(f"Without quotas there is one segment, which keeps 1 to N, got {sizes} and total={total}.")
    if quotas is not None and quotas.shape != (scores.shape[0], len(sizes)):
        raise ValueError(f"quotas must be [{scores.shape[0]}, {len(sizes)}], got {tuple(quotas.shape)}.")
    run = _OP if scores.dtype in _EXACT_IN_FP32 else reference
    return run(scores.detach(), sizes, quotas, total)


def reference(scores: Tensor, sizes: list[int], quotas: Tensor | None, total: int) -> Tensor:
    """`segmented_topk` in PyTorch."""
    if quotas is None and total == 1:
        return scores.argmax(dim=1, keepdim=True)  # documented to be the first of equal ones, and NaN is the largest
    # torch.topk leaves the order of ties open; a stable sort does not
    by_score = torch.sort(scores, dim=1, descending=True, stable=True).indices
    if quotas is None:
        return by_score[:, :total].sort(dim=1).values.contiguous()
    num_rows, num_tokens = scores.shape
    size = on_device(sizes, scores.device)
    segment = torch.repeat_interleave(torch.arange(len(sizes), device=size.device), size, output_size=num_tokens)
    # sorted by segment, and inside a segment by score: the place in its segment is then a token's rank
    by_segment = by_score.gather(1, segment[by_score].sort(dim=1, stable=True).indices)
    at = torch.arange(num_tokens, device=size.device)
    rank = at - (size.cumsum(0) - size)[segment]
    kept = torch.zeros(num_rows, num_tokens, dtype=torch.bool, device=size.device)
    kept.scatter_(1, by_segment, rank < quotas[:, segment])
    place = torch.where(kept, kept.cumsum(1) - 1, total).clamp_max_(total)
    chosen = torch.full((num_rows, total + 1), -1, dtype=torch.int64, device=size.device)
    return chosen.scatter_(1, place, at.expand_as(place))[:, :total].contiguous()


def launch(scores: Tensor, sizes: list[int], quotas: Tensor | None, total: int) -> Tensor:
    num_rows = scores.shape[0]
    chosen = torch.full((num_rows, total), -1, dtype=torch.int64, device=scores.device)
    if not chosen.numel() or not sizes:
        return chosen
    if len(sizes) == 1:  # made there, so that nothing is copied
        starts = torch.arange(0, sizes[0] + 1, sizes[0], device=scores.device)
    else:
        starts = on_device([0, *accumulate(sizes)], scores.device)
    block = power_of_two(max(sizes), 16)
    segment_kernel[(len(sizes), num_rows)](
        scores, starts, chosen if quotas is None else quotas.contiguous(), chosen,
        len(sizes), total, *scores.stride(),
        quotas is not None, power_of_two(len(sizes)), block, num_warps=power_of_two(block // 256, 1, 16),
    )  # fmt: skip
    return chosen


@Kernel
def segment_kernel(
    p_scores, p_starts, p_quotas, p_chosen, segments, total, s_m, s_n,
    QUOTAS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One segment of one row: finds the score of rank `quota` bit by bit, and writes who is above it in order."""
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin = tl.load(p_starts + segment).to(tl.int32)
    size = tl.load(p_starts + segment + 1).to(tl.int32) - begin
    quota, before = total, 0
    if QUOTAS:
        o_s = tl.arange(0, BLOCK_S)
        b_quota = tl.load(p_quotas + row * segments + o_s, mask=o_s < segments, other=0).to(tl.int32)
        quota = tl.sum(tl.where(o_s == segment, b_quota, 0), axis=0)
        before = tl.sum(tl.where(o_s < segment, b_quota, 0), axis=0)
    o_n = tl.arange(0, BLOCK)
    is_token = o_n < size
    score = tl.load(p_scores + row * s_m + (begin + o_n) * s_n, mask=is_token, other=0.0).to(tl.float32)
    score = tl.where(score == 0.0, 0.0, score)
    # the bits of floats, negative ones flipped, sort as the floats do; so does every prefix of them
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(score != score, 0x7FFFFFFF, bits)
    # the highest bit is the sign, whose weight is negative
    positive = tl.sum((is_token & (bits >= 0)).to(tl.int32), axis=0) >= quota  # type: ignore[operator]
    threshold = tl.where(positive, 0, -0x7FFFFFFF - 1)
    for bit in range(31):
        trial = threshold + (1 << (30 - bit))
        enough = tl.sum((is_token & (bits >= trial)).to(tl.int32), axis=0) >= quota  # type: ignore[operator]
        threshold = tl.where(enough, trial, threshold)
    above = is_token & (bits > threshold)
    level = is_token & (bits == threshold)
    left = quota - tl.sum(above.to(tl.int32), axis=0)  # type: ignore[operator]
    kept = above | (level & (tl.cumsum(level.to(tl.int32), axis=0) <= left))
    place = before + tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(p_chosen + row * total + place, (begin + o_n).to(tl.int64), mask=kept & (place < total))


def _fake(scores: Tensor, sizes: list[int], quotas: Tensor | None, total: int) -> Tensor:
    return scores.new_empty(scores.shape[0], total, dtype=torch.int64)


_OP = Op(
    "segmented_topk(Tensor scores, SymInt[] sizes, Tensor? quotas, SymInt total) -> Tensor", reference, launch, _fake
)
