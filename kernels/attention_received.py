"""Attention that each key receives: column sums of softmax(Q K^T) over all queries, without the matrix.

A first pass over the keys gives each query row its log-sum-exp, a second one sums the powers of each column. Memory is
O(N); the matrix of N x N is formed tile by tile, twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenprune.kernels.attention_rows import check_heads
from tokenprune.kernels.dispatch import Op
from tokenprune.kernels.launch import Kernel, block_of_width, ceil_div, must_widen

if TYPE_CHECKING:
    import triton.language as tl

_CHUNK = 128  # query rows at a time in the reference
_FEWEST = 32  # of them where keys are many: a product of fewer rows is slower than memory
_BLOCK = 1 << 18  # logits at a time on a CPU, 1 MB: what stays in a core's cache between product, softmax and sum


def attention_received(query: Tensor, key: Tensor, scale: float, lengths: Tensor | None = None) -> Tensor:
    """Softmax attention that each key gets from all query rows together, in fp32, averaged over the heads.

    Every row sees every key (no causal mask), as in a vision tower. The reference costs 2 B H R N d floating-point
    operations, the kernel twice that: it forms the logits in both passes.

    Args:
        query: `[B, H, R, d]`, any float dtype, any strides.
        key: `[B, Hk, N, d]`, likewise; heads as in `attention_rows`.
        scale: what the dot products are multiplied by, usually 1 / sqrt(d).
        lengths: `[B]` int64 for ragged batches where R = N: only the first lengths[b] queries and keys of b count.

    Returns:
        `[B, N]` fp32; a row sums to R (to lengths[b]), with zeros at keys that do not count.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    check_heads("attention_received", query, key)
    if lengths is not None and (lengths.shape != key.shape[:1] or query.shape[2] != key.shape[2]):
        raise ValueError(
            f"lengths must be [B] for as many queries as keys, got lengths {tuple(lengths.shape)}, query "
            f"{tuple(query.shape)} and key {tuple(key.shape)}."
        )
    return _OP(query, key, scale, lengths)


def reference(query: Tensor, key: Tensor, scale: float, lengths: Tensor | None) -> Tensor:
    """`attention_received` in PyTorch: some rows at a time."""
    batch, heads, rows, width = query.shape
    key_heads, count = key.shape[1:3]
    # what autograd looks back on cannot be written over
    differentiable = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if batch == 1 and heads == key_heads and lengths is None and key.device.type == "cpu" and not differentiable:
        return _in_blocks(query[0].float() * scale, key[0].float().transpose(1, 2))[None]
    if batch > 1 and key.device.type == "cpu":  # as in attention_rows
        sizes = [None] * batch if lengths is None else lengths.split(1)
        return torch.cat([reference(q, k, scale, n) for q, k, n in zip(query.split(1), key.split(1), sizes)])
    grouped = (query.float() * scale).reshape(batch, key_heads, heads // key_heads, rows, width)
    keys = key.float().transpose(2, 3)
    seen = None if lengths is None else torch.arange(count, device=key.device) < lengths[:, None]
    received = keys.new_zeros(batch, key_heads, count)
    for start in range(0, rows, _CHUNK):
        part = grouped[:, :, :, start : start + _CHUNK]
        logits = torch.matmul(part.flatten(2, 3), keys)
        if seen is None:
            received = received + logits.softmax(dim=-1).sum(dim=2)
            continue
        weights = logits.masked_fill(~seen[:, None, None], float("-inf")).softmax(dim=-1).unflatten(2, part.shape[2:4])
        counts = seen[:, None, None, start : start + _CHUNK, None]
        received = received + weights.masked_fill(~counts, 0).sum(dim=(2, 3))
    return received.sum(dim=1) / heads


def _in_blocks(query: Tensor, keys: Tensor) -> Tensor:
    """`[N]` fp32: the columns of softmax(query keys) summed over the rows and averaged over the heads, on a CPU.

    Every block of logits is made, normalised and added up in one piece of memory that fits the cache. A new tensor for
    each would be new pages of the system each time, which costs as much as the arithmetic.

    Args:
        query: `[H, R, d]` fp32, scaled.
        keys: `[H, d, N]` fp32.
    """
    heads, rows, _ = query.shape
    count = keys.shape[2]
    chunk = max(1, min(_CHUNK, max(_FEWEST, _BLOCK // max(count, 1)), rows))
    group = max(1, min(heads, _BLOCK // max(chunk * count, 1)))
    received = keys.new_zeros(heads, count)
    memory = keys.new_empty(group * chunk * count)
    for first in range(0, heads, group):
        some, total = keys[first : first + group], received[first : first + group]
        for start in range(0, rows, chunk):
            part = query[first : first + group, start : start + chunk]
            shape = (*part.shape[:2], count)
            logits = memory[: part.shape[0] * part.shape[1] * count].view(shape)
            torch.softmax(torch.bmm(part, some, out=logits), dim=-1, out=logits)
            total += logits.sum(dim=1)
    return received.sum(dim=0) / heads


def launch(query: Tensor, key: Tensor, scale: float, lengths: Tensor | None) -> Tensor:
    batch, heads, rows, width = query.shape
    count = key.shape[2]
    lse = query.new_empty(batch, heads, rows, dtype=torch.float32)
    received = query.new_empty(batch, heads, count, dtype=torch.float32)
    ragged = lengths is not None
    lengths = lengths.contiguous() if ragged else None
    shared = (query, key, lengths if ragged else query, lse, received, scale, heads, heads // key.shape[1], rows, count)
    blocks = (width, *query.stride(), *key.stride(), ragged, must_widen(query.dtype, key.dtype), 64, 64)
    blocks = (*blocks, block_of_width(width, query.dtype, key.dtype))
    log_sum_exp_kernel[(ceil_div(rows, 64), heads, batch)](*shared, *blocks)
    columns_kernel[(ceil_div(count, 64), heads, batch)](*shared, *blocks)
    return received.mean(dim=1)


@Kernel
def log_sum_exp_kernel(
    p_q, p_k, p_lengths, p_lse, p_received, scale, heads, group, rows, count, width,
    q_b, q_h, q_r, q_d, k_b, k_h, k_n, k_d,
    RAGGED: tl.constexpr, WIDEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of each query row over all keys."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    keys = count
    if RAGGED:
        keys = tl.load(p_lengths + batch).to(tl.int32)
    p_q += batch * q_b + head * q_h + o_r * q_r
    p_k += batch * k_b + (head // group) * k_h
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, keys, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        b_s = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        for start in range(0, width, BLOCK_D):
            o_d = start + tl.arange(0, BLOCK_D)
            inside = o_d < width
            b_q = tl.load(p_q[:, None] + o_d[None] * q_d, mask=(o_r < rows)[:, None] & inside[None], other=0.0)
            m_k = (o_n < keys)[None] & inside[:, None]
            b_k = tl.load(p_k + o_n[None] * k_n + o_d[:, None] * k_d, mask=m_k, other=0.0)
            if WIDEN:
                b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
            b_s += tl.dot(b_q, b_k, input_precision="tf32x3")
        b_s = tl.where((o_n < keys)[None], b_s * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(b_s, axis=1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(b_s - higher[:, None]), axis=1)
        peak = higher
    tl.store(p_lse + (batch * heads + head) * rows + o_r, peak + tl.log(total), mask=o_r < rows)


@Kernel
def columns_kernel(
    p_q, p_k, p_lengths, p_lse, p_received, scale, heads, group, rows, count, width,
    q_b, q_h, q_r, q_d, k_b, k_h, k_n, k_d,
    RAGGED: tl.constexpr, WIDEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum over all rows of one tile of columns, by head."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keys, queries = count, rows
    if RAGGED:
        keys = tl.load(p_lengths + batch).to(tl.int32)
        queries = keys
    p_q += batch * q_b + head * q_h
    p_k += batch * k_b + (head // group) * k_h + o_n * k_n
    p_lse += (batch * heads + head) * rows
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, queries, BLOCK_R):
        o_r = first + tl.arange(0, BLOCK_R)
        b_s = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for start in range(0, width, BLOCK_D):
            o_d = start + tl.arange(0, BLOCK_D)
            inside = o_d < width
            m_q = (o_r < queries)[None] & inside[:, None]
            b_q = tl.load(p_q + o_r[None] * q_r + o_d[:, None] * q_d, mask=m_q, other=0.0)
            b_k = tl.load(p_k[:, None] + o_d[None] * k_d, mask=(o_n < keys)[:, None] & inside[None], other=0.0)
            if WIDEN:
                b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
            b_s += tl.dot(b_k, b_q, input_precision="tf32x3")
        b_lse = tl.load(p_lse + o_r, mask=o_r < queries, other=float("inf"))
        b_sum += tl.sum(tl.exp(b_s * scale - b_lse[None]), axis=1)
    b_sum = tl.where(o_n < keys, b_sum, 0.0)
    tl.store(p_received + (batch * heads + head) * count + o_n, b_sum, mask=o_n < count)


def _fake(query: Tensor, key: Tensor, scale: float, lengths: Tensor | None) -> Tensor:
    return query.new_empty(key.shape[0], key.shape[2], dtype=torch.float32)


def _flops(query: Tensor, key: Tensor, scale: float, lengths: Tensor | None) -> int:
    passes = 2 if query.is_cuda else 1
    return passes * 2 * query.numel() * key.shape[2]


_OP = Op(
    "attention_received(Tensor query, Tensor key, float scale, Tensor? lengths) -> Tensor",
    reference,
    launch,
    _fake,
    _flops,
)
