"""Attention of a few query rows over all keys, as head-mean scores: what [CLS], last-token and instruction rows cost.

Only the rows that a method asked for are formed, so memory is rows x keys and never keys x keys, and grouped-query
attention reads each key head once instead of repeating it for every query head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenprune.kernels.dispatch import Op
from tokenprune.kernels.launch import Kernel, block_of_width, ceil_div, must_widen, power_of_two

if TYPE_CHECKING:
    import triton.language as tl


def attention_rows(query: Tensor, key: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of each query row over all keys, in fp32, averaged over the heads.

    Costs 2 B H R N d floating-point operations and one read of `key`.

    Args:
        query: `[B, H, R, d]`, any float dtype, any strides.
        key: `[B, Hk, N, d]`, any float dtype, any strides; H is a multiple of Hk and query head h reads key head
            h // (H / Hk), the order of grouped-query attention in Hugging Face models.
        scale: what the dot products are multiplied by, usually 1 / sqrt(d).
        mask: `[B, R, N]` bool, True where a row sees a key; each row must see one at least. None: every row sees all.

    Returns:
        `[B, R, N]` fp32; every row sums to 1, with zeros at keys that it does not see.

    Raises:
        ValueError: the shapes do not fit each other, or the mask is no bool tensor of its shape.
    """
    check_heads("attention_rows", query, key)
    wanted = (query.shape[0], query.shape[2], key.shape[2])
    if mask is not None and (mask.shape != wanted or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {list(wanted)}, got {mask.dtype} {list(mask.shape)}.")
    return _OP(query, key, scale, mask)


def check_heads(op: str, query: Tensor, key: Tensor) -> None:
    """Raise ValueError unless query `[B, H, R, d]` and key `[B, Hk, N, d]` fit each other."""
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            f"{op} needs query [B, H, R, d] and key [B, Hk, N, d], got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    batch, heads, _, width = query.shape
    key_batch, key_heads, _, key_width = key.shape
    if batch != key_batch or width != key_width or key_heads == 0 or heads % key_heads:
        raise ValueError(
            f"Query {tuple(query.shape)} and key {tuple(key.shape)} do not fit: batch and width must agree and the "
            "query heads must be a multiple of the key heads."
        )


def reference(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """`attention_rows` in PyTorch."""
    batch, heads, rows, width = query.shape
    key_heads, count = key.shape[1:3]
    if batch > 1 and key.device.type == "cpu":  # one product for all would first copy the keys of all
        masks = [None] * batch if mask is None else mask.split(1)
        return torch.cat([reference(q, k, scale, m) for q, k, m in zip(query.split(1), key.split(1), masks)])
    # the query heads of one key head become more rows of it, so no key is copied
    grouped = (query.float() * scale).reshape(batch, key_heads, heads // key_heads * rows, width)
    logits = torch.matmul(grouped, key.float().transpose(2, 3))
    if mask is None:
        return logits.softmax(dim=-1).view(batch, heads, rows, count).mean(dim=1)
    logits = logits.view(batch, heads, rows, count).masked_fill(~mask[:, None], float("-inf"))
    return logits.softmax(dim=-1).mean(dim=1)


def launch(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    batch, heads, rows, width = query.shape
    key_heads, count = key.shape[1:3]
    group = heads // key_heads
    block_r, block_n = power_of_two(group * rows, 16, 32), 64
    tiles = ceil_div(count, block_n)
    logits = query.new_empty(batch, heads, rows, count, dtype=torch.float32)
    peaks = query.new_empty(2, batch, heads, rows, tiles, dtype=torch.float32)
    out = query.new_empty(batch, rows, count, dtype=torch.float32)
    seen = query if mask is None else mask
    logits_kernel[(tiles, ceil_div(group * rows, block_r), batch * key_heads)](
        query, key, seen, logits, peaks[0], peaks[1], scale, key_heads, group, rows, count, width, tiles,
        *query.stride(), *key.stride(), *(seen.stride()[:3]), mask is not None, must_widen(query.dtype, key.dtype),
        block_r, block_n, block_of_width(width, query.dtype, key.dtype),
    )  # fmt: skip
    mean_kernel[(ceil_div(count, 256), rows, batch)](
        logits, peaks[0], peaks[1], out, heads, rows, count, tiles, power_of_two(tiles), 256
    )
    return out


@Kernel
def logits_kernel(
    p_q, p_k, p_mask, p_logits, p_peaks, p_sums, scale, key_heads, group, rows, count, width, tiles,
    q_b, q_h, q_r, q_d, k_b, k_h, k_n, k_d, m_b, m_r, m_n,
    MASKED: tl.constexpr, WIDEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits of one tile of keys for all query rows of a key head, with their maximum and sum of powers in the tile."""
    tile = tl.program_id(0)
    batch = (tl.program_id(2) // key_heads).to(tl.int64)
    key_head = tl.program_id(2) % key_heads
    o_i = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = o_i < group * rows
    head, row = key_head * group + o_i // rows, o_i % rows
    p_q += batch * q_b + head * q_h + row * q_r
    p_k += batch * k_b + key_head * k_h + o_n * k_n
    b_s = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        inside = o_d < width
        b_q = tl.load(p_q[:, None] + o_d[None] * q_d, mask=is_row[:, None] & inside[None], other=0.0)
        b_k = tl.load(p_k[:, None] + o_d[None] * k_d, mask=(o_n < count)[:, None] & inside[None], other=0.0)
        if WIDEN:
            b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
        b_s += tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3")
    seen = is_row[:, None] & (o_n < count)[None]
    if MASKED:
        # a mask of rows x keys is the one tensor here that can have more than 2^31 entries in a batch
        p_mask += batch * m_b + row.to(tl.int64) * m_r
        seen = seen & tl.load(p_mask[:, None] + o_n[None] * m_n, mask=seen, other=0).to(tl.int1)
    b_s = tl.where(seen, b_s * scale, float("-inf"))
    peak = tl.max(b_s, axis=1)
    power = tl.exp(b_s - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
    line = (batch * key_heads * group + head) * rows + row
    tl.store(p_peaks + line * tiles + tile, peak, mask=is_row)
    tl.store(p_sums + line * tiles + tile, tl.sum(power, axis=1), mask=is_row)
    tl.store(p_logits + line[:, None] * count + o_n[None], b_s, mask=is_row[:, None] & (o_n < count)[None])


@Kernel
def mean_kernel(
    p_logits, p_peaks, p_sums, p_out, heads, rows, count, tiles, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Softmax of each head's row from the tiles' maxima and sums, and the mean over heads."""
    row, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_t = tl.arange(0, BLOCK_T)
    b_out = tl.zeros([BLOCK_N], tl.float32)
    for head in range(heads):
        line = (batch * heads + head) * rows + row
        b_peak = tl.load(p_peaks + line * tiles + o_t, mask=o_t < tiles, other=float("-inf"))
        b_sum = tl.load(p_sums + line * tiles + o_t, mask=o_t < tiles, other=0.0)
        peak = tl.max(b_peak, axis=0)
        total = tl.sum(b_sum * tl.exp(b_peak - peak), axis=0)
        b_s = tl.load(p_logits + line * count + o_n, mask=o_n < count, other=float("-inf"))
        b_out += tl.exp(b_s - peak) / total
    tl.store(p_out + (batch * rows + row) * count + o_n, b_out / heads, mask=o_n < count)


def _fake(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], key.shape[2], dtype=torch.float32)


def _flops(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> int:
    return 2 * query.numel() * key.shape[2]


_OP = Op(
    "attention_rows(Tensor query, Tensor key, float scale, Tensor? mask) -> Tensor", reference, launch, _fake, _flops
)
