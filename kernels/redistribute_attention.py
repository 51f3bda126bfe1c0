"""Attention that takes a share from sinks and gives it to the other visual keys, where a head looks at the image.

The redistribution of VAR (https://arxiv.org/abs/2503.03321) in closed form: keys fall into four groups, visual sinks S,
other visual keys N, other sinks T and the rest. In the rows that pass its test, probabilities of S and T shrink by
1 - p, those of N grow by 1 + p (m_S + m_T) / m_N where m are the groups' masses, and the sum stays 1. The kernel keeps
a sum of powers for each group and a vector for S with T, N and the rest, so one read of keys and values is enough and
no probabilities are stored; parts of the keys are reduced by different programs and joined through their maxima.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenprune.kernels._ops import Op
from tokenprune.kernels._triton import Kernel, block_of_width, ceil_div, must_widen, power_of_two
from tokenprune.kernels.attention_rows import check_heads

if TYPE_CHECKING:
    import triton.language as tl

_PROGRAMS = 256  # wanted at least, so that a decode row keeps all multiprocessors of a GPU busy


def redistribute_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    sink: Tensor,
    visual: Tensor,
    p: float,
    least_mass: float = 0.0,
    least_ratio: float = 0.0,
    mask: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of some query rows, redistributed in the heads and rows that pass the test.

    A head and row is active where its gate is open, m_S + m_N >= least_mass, m_N >= least_ratio (m_S + m_N) and
    m_N > 0. For the tail of a prompt pass its text rows and a mask; for a decode step its one row.

    Args:
        query: `[B, H, R, d]`, any float dtype, any strides.
        key: `[B, Hk, N, d]`, likewise; heads as in `attention_rows`.
        value: `[B, Hk, N, e]`, of the key's dtype.
        scale: what the dot products are multiplied by, usually 1 / sqrt(d).
        sink: `[B, N]` bool, True at keys that give.
        visual: `[B, N]` bool, True at visual keys; those that are no sinks receive.
        p: share of the sinks' mass that moves, in [0, 1].
        least_mass: of all visual keys together, of the row's total of 1.
        least_ratio: of visual keys that are no sinks among the visual ones.
        mask: `[B, R, N]` bool, True where a row sees a key; each row must see one at least. None: every row sees all.
        gate: `[B, H, R]` bool, True where redistribution is allowed. None: everywhere.

    Returns:
        `[B, H, R, e]` of the query's dtype, and `[B, H, R]` bool, True at active rows.

    Raises:
        ValueError: the shapes do not fit each other, or p is no share.
    """
    check_heads("redistribute_attention", query, key)
    batch, _, rows, _ = query.shape
    count = key.shape[2]
    wanted = {
        "value": (value.shape[:3], key.shape[:3]),
        "sink": (sink.shape, (batch, count)),
        "visual": (visual.shape, (batch, count)),
        "mask": ((batch, rows, count) if mask is None else mask.shape, (batch, rows, count)),
        "gate": (query.shape[:3] if gate is None else gate.shape, query.shape[:3]),
    }
    for name, (given, fits) in wanted.items():
        if tuple(given) != tuple(fits):
            raise ValueError(f"{name} must be {list(fits)} here, got {list(given)}.")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be a share in [0, 1], got {p!r}.")
    return _OP(query, key, value, scale, sink, visual, p, least_mass, least_ratio, mask, gate)


def reference(
    query: Tensor, key: Tensor, value: Tensor, scale: float, sink: Tensor, visual: Tensor,
    p: float, least_mass: float, least_ratio: float, mask: Tensor | None, gate: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`redistribute_attention` in PyTorch, from the probabilities of these rows."""
    batch, heads, rows, width = query.shape
    key_heads, count = key.shape[1:3]
    grouped = (query.float() * scale).reshape(batch, key_heads, heads // key_heads * rows, width)
    logits = torch.matmul(grouped, key.float().transpose(2, 3))
    if mask is not None:
        logits = logits.view(batch, heads, rows, count).masked_fill(~mask[:, None], float("-inf")).view_as(logits)
    weights = logits.softmax(dim=-1)
    groups = torch.stack([sink & visual, ~sink & visual, sink & ~visual, ~sink & ~visual], dim=1).to(weights.dtype)
    masses = torch.matmul(weights, groups[:, None].transpose(2, 3))  # [B, Hk, G R, 4]
    visual_sinks, others, sinks = masses[..., 0], masses[..., 1], masses[..., 2]
    in_image = visual_sinks + others
    active = (in_image >= least_mass) & (others >= least_ratio * in_image) & (others > 0)
    if gate is not None:
        active = active & gate.reshape(active.shape)
    grown = p * (visual_sinks + sinks) / torch.where(active, others, 1)
    zero = torch.zeros_like(grown)
    change = torch.stack([zero - p, grown, zero - p, zero], dim=-1) * active[..., None]
    weights = weights * (1 + torch.matmul(change, groups[:, None]))
    out = torch.matmul(weights, value.float()).view(batch, heads, rows, -1)
    return out.to(query.dtype), active.view(batch, heads, rows)


def launch(
    query: Tensor, key: Tensor, value: Tensor, scale: float, sink: Tensor, visual: Tensor,
    p: float, least_mass: float, least_ratio: float, mask: Tensor | None, gate: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, rows, width = query.shape
    key_heads, count, out_width = value.shape[1:]
    group = heads // key_heads
    block_r, block_n, block_v = 16, 32, power_of_two(out_width, 16)
    blocks, tiles = ceil_div(group * rows, block_r), ceil_div(count, block_n)
    splits = min(tiles, ceil_div(_PROGRAMS, blocks * batch * key_heads))
    tiles_each = ceil_div(tiles, splits)
    splits = ceil_div(tiles, tiles_each)
    sums = query.new_empty(batch, heads, rows, splits, 5, dtype=torch.float32)
    vectors = query.new_empty(batch, heads, rows, splits, 3, out_width, dtype=torch.float32)
    kinds = (sink.to(torch.int8) + 2 * visual.to(torch.int8)).contiguous()
    seen = query if mask is None else mask
    # wide fp32 tiles leave shared memory for one stage, and registers for eight warps
    stages = 2 if key.element_size() * max(block_v, power_of_two(width)) <= 256 else 1
    warps = 4 if key.element_size() == 2 else 8
    groups_kernel[(splits, blocks, batch * key_heads)](
        query, key, value, kinds, seen, sums, vectors, scale, key_heads, group, rows, count, width, out_width,
        splits, tiles_each, *query.stride(), *key.stride(), *value.stride(), *(seen.stride()[:3]),
        mask is not None, must_widen(query.dtype, key.dtype), must_widen(value.dtype), block_r, block_n,
        block_of_width(width, query.dtype, key.dtype), block_v, num_stages=stages, num_warps=warps,
    )  # fmt: skip
    out = query.new_empty(batch, heads, rows, out_width)
    active = query.new_empty(batch, heads, rows, dtype=torch.bool)
    join_kernel[(batch * heads * rows,)](
        sums, vectors, kinds if gate is None else gate.contiguous(), out, active.view(torch.uint8), p, least_mass,
        least_ratio, splits, out_width, gate is not None, power_of_two(splits), block_v,
    )  # fmt: skip
    return out, active


@Kernel
def groups_kernel(
    p_q, p_k, p_v, p_kinds, p_mask, p_sums, p_vectors, scale, key_heads, group, rows, count, width, out_width,
    splits, tiles_each, q_b, q_h, q_r, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, m_b, m_r, m_n,
    MASKED: tl.constexpr, WIDEN_K: tl.constexpr, WIDEN_V: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Maximum, four sums of powers and three vectors of all query rows of a key head, over one part of the keys."""
    split = tl.program_id(0)
    batch = (tl.program_id(2) // key_heads).to(tl.int64)
    key_head = tl.program_id(2) % key_heads
    o_i = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_v = tl.arange(0, BLOCK_V)
    there = o_i < group * rows
    head, row = key_head * group + o_i // rows, o_i % rows
    p_q += batch * q_b + head * q_h + row * q_r
    p_k += batch * k_b + key_head * k_h
    p_v += batch * v_b + key_head * v_h
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    z_s = tl.zeros([BLOCK_R], tl.float32)
    z_n, z_t, z_o = z_s, z_s, z_s
    u_sinks = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    u_n, u_o = u_sinks, u_sinks
    begin = split * tiles_each * BLOCK_N
    for first in range(begin, tl.minimum(begin + tiles_each * BLOCK_N, count), BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n_ = o_n < count
        b_s = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        for start in range(0, width, BLOCK_D):
            o_d = start + tl.arange(0, BLOCK_D)
            inside = o_d < width
            b_q = tl.load(p_q[:, None] + o_d[None] * q_d, mask=there[:, None] & inside[None], other=0.0)
            b_k = tl.load(p_k + o_n[None] * k_n + o_d[:, None] * k_d, mask=m_n_[None] & inside[:, None], other=0.0)
            if WIDEN_K:
                b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
            b_s += tl.dot(b_q, b_k, input_precision="tf32x3")
        seen = there[:, None] & m_n_[None]
        if MASKED:
            seen = seen & tl.load(p_mask + batch * m_b + row[:, None] * m_r + o_n[None] * m_n, mask=seen, other=0).to(
                tl.int1
            )
        b_s = tl.where(seen, b_s * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(b_s, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(peak - base)
        peak = higher
        power = tl.exp(b_s - base[:, None])
        kind = tl.load(p_kinds + batch * count + o_n, mask=m_n_, other=0)
        power_n = tl.where((kind == 2)[None], power, 0.0)
        power_o = tl.where((kind == 0)[None], power, 0.0)
        power_t = tl.where((kind == 1)[None], power, 0.0)
        power_s = tl.where((kind == 3)[None], power, 0.0)
        z_s = z_s * shrink + tl.sum(power_s, axis=1)
        z_n = z_n * shrink + tl.sum(power_n, axis=1)
        z_t = z_t * shrink + tl.sum(power_t, axis=1)
        z_o = z_o * shrink + tl.sum(power_o, axis=1)
        b_v = tl.load(
            p_v + o_n[:, None] * v_n + o_v[None] * v_d, mask=m_n_[:, None] & (o_v < out_width)[None], other=0.0
        )
        if WIDEN_V:
            b_v = b_v.to(tl.float32)
        u_sinks = u_sinks * shrink[:, None] + tl.dot((power_s + power_t).to(b_v.dtype), b_v, input_precision="tf32x3")
        u_n = u_n * shrink[:, None] + tl.dot(power_n.to(b_v.dtype), b_v, input_precision="tf32x3")
        u_o = u_o * shrink[:, None] + tl.dot(power_o.to(b_v.dtype), b_v, input_precision="tf32x3")
    line = ((batch * key_heads * group + head) * rows + row) * splits + split
    p_sums += line * 5
    tl.store(p_sums, peak, mask=there)
    tl.store(p_sums + 1, z_s, mask=there)
    tl.store(p_sums + 2, z_n, mask=there)
    tl.store(p_sums + 3, z_t, mask=there)
    tl.store(p_sums + 4, z_o, mask=there)
    p_vectors += line[:, None] * 3 * out_width + o_v[None]
    inside_v = there[:, None] & (o_v < out_width)[None]
    tl.store(p_vectors, u_sinks, mask=inside_v)
    tl.store(p_vectors + out_width, u_n, mask=inside_v)
    tl.store(p_vectors + 2 * out_width, u_o, mask=inside_v)


@Kernel
def join_kernel(
    p_sums, p_vectors, p_gate, p_out, p_active, p, least_mass, least_ratio, splits, out_width,
    GATED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row: the parts on one scale, the test, and the groups under their factors."""
    line = tl.program_id(0).to(tl.int64)
    o_s, o_v = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V)
    p_sums += line * splits * 5
    m_s = o_s < splits
    b_peak = tl.load(p_sums + o_s * 5, mask=m_s, other=float("-inf"))
    peak = tl.max(b_peak, axis=0)
    b_scale = tl.exp(b_peak - peak)
    z_s = tl.sum(b_scale * tl.load(p_sums + o_s * 5 + 1, mask=m_s, other=0.0), axis=0)
    z_n = tl.sum(b_scale * tl.load(p_sums + o_s * 5 + 2, mask=m_s, other=0.0), axis=0)
    z_t = tl.sum(b_scale * tl.load(p_sums + o_s * 5 + 3, mask=m_s, other=0.0), axis=0)
    z_o = tl.sum(b_scale * tl.load(p_sums + o_s * 5 + 4, mask=m_s, other=0.0), axis=0)
    total = z_s + z_n + z_t + z_o
    in_image = z_s + z_n
    active = (in_image >= least_mass * total) & (z_n >= least_ratio * in_image) & (z_n > 0.0)  # type: ignore[operator]
    if GATED:
        active = active & tl.load(p_gate + line).to(tl.int1)
    shrunk = tl.where(active, 1.0 - p, 1.0)
    grown = tl.where(active, 1.0 + p * (z_s + z_t) / tl.where(active, z_n, 1.0), 1.0)
    b_out = tl.zeros([BLOCK_V], tl.float32)
    for split in range(splits):
        part = tl.exp(tl.load(p_sums + split * 5) - peak)
        p_u = p_vectors + (line * splits + split) * 3 * out_width + o_v
        u_sinks = tl.load(p_u, mask=o_v < out_width, other=0.0)
        u_n = tl.load(p_u + out_width, mask=o_v < out_width, other=0.0)
        u_o = tl.load(p_u + 2 * out_width, mask=o_v < out_width, other=0.0)
        b_out += part * (shrunk * u_sinks + grown * u_n + u_o)
    tl.store(p_out + line * out_width + o_v, (b_out / total).to(p_out.dtype.element_ty), mask=o_v < out_width)
    tl.store(p_active + line, active.to(tl.uint8))


def _fake(
    query: Tensor, key: Tensor, value: Tensor, scale: float, sink: Tensor, visual: Tensor,
    p: float, least_mass: float, least_ratio: float, mask: Tensor | None, gate: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3], dtype=torch.bool)


def _flops(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> int:
    batch, heads, rows, width = query.shape
    return 2 * batch * heads * rows * key.shape[2] * (width + 3 * value.shape[3])


_OP = Op(
    "redistribute_attention(Tensor query, Tensor key, Tensor value, float scale, Tensor sink, Tensor visual, float p, "
    "float least_mass, float least_ratio, Tensor? mask, Tensor? gate) -> (Tensor, Tensor)",
    reference,
    launch,
    _fake,
    _flops,
)
