"""Attention of a few query rows in which visual non-sinks receive a share of what sinks get: VAR in closed form.

Keys belong to four groups. With a_j the softmax weights of one row of one head and m_g the sum of a over group g,

    freed = share * (m_S + m_T)
    a'    = (1 - share) a on sinks,   a (1 + freed / m_N) on visual non-sinks,   a elsewhere

in the (head, row) pairs that pass `least_mass` and `most_sink`, and a' = a in all others. The weights still sum to 1,
so the softmax denominator stays. Only the rows that were asked for are formed: memory is rows x keys at the most and
never keys x keys. The kernels form no weights at all: a sum of powers for each group and a vector for S with T, for N
and for O make one read of keys and values enough; parts of the keys are reduced by different programs and joined.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from tokenprune.kernels.attention_rows import check_heads
from tokenprune.kernels.dispatch import Op
from tokenprune.kernels.launch import Kernel, block_of_width, ceil_div, must_widen, power_of_two

if TYPE_CHECKING:
    import triton.language as tl

OTHER, VISUAL, VISUAL_SINK, TEXT_SINK = range(4)
"""Groups of keys: text and all that came later (O), visual non-sinks (N), visual sinks (S), text sinks (T)."""

_BLOCK = 64  # query rows at a time, in PyTorch
_PROGRAMS = 256  # wanted at least, so that a decode row keeps all multiprocessors of a GPU busy


def redistribute_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Tensor,
    allowed: Tensor | None,
    gate: Tensor | None = None,
    *,
    share: float,
    least_mass: float,
    most_sink: float,
    slack: float,
    scale: float,
) -> Tensor:
    """Output of the redistributed attention.

    A pair of head and row is changed if the row's gate is open, m_S + m_N >= `least_mass`, m_N > 0 and
    m_S <= `most_sink` * (m_S + m_N + `slack` * |N and S|).

    Args:
        query: `[B, H, R, d]`, rotated.
        key: `[B, Hk, K, d]`, rotated; H is a multiple of Hk, query head h reads key head h // (H / Hk).
        value: `[B, Hk, K, d]`.
        groups: `[B, P]` int8 with P <= K, the group of each of the first P keys; later keys are `OTHER`.
        allowed: `[B or 1, R, K]` bool, True where a row sees a key; what a row without any gets is finite and means
            nothing. None: every row sees all keys.
        gate: `[B, R]` bool, rows that may be changed; None: all.
        share: part of the sinks' attention that moves, in [0, 1].
        least_mass: attention that the picture must get in all.
        most_sink: part of the picture's attention that its sinks may have at most.
        slack: added per visual key to the picture's attention in that test.
        scale: what the dot products are multiplied by.

    Returns:
        `[B, H, R, d]` in the dtype of `value`.

    Raises:
        ValueError: the shapes do not fit each other; without the kernels it is torch's own RuntimeError.
    """
    return _OP(query, key, value, groups, allowed, gate, share, least_mass, most_sink, slack, scale)


def _check(
    query: Tensor, key: Tensor, value: Tensor, groups: Tensor, allowed: Tensor | None, gate: Tensor | None
) -> None:
    # only kernels read whatever a pointer says; a decode step on a CPU would feel the time of these
    check_heads("redistribute_attention", query, key)
    batch, _, rows, _ = query.shape
    count = key.shape[2]
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must be {[*key.shape[:3]]} and its width here, like key, got {[*value.shape]}.")
    if groups.dim() != 2 or groups.shape[0] != batch or groups.shape[1] > count:
        raise ValueError(f"groups must be [{batch}, P] here with P at most {count}, got {[*groups.shape]}.")
    if allowed is not None and allowed.shape not in ((batch, rows, count), (1, rows, count)):
        raise ValueError(f"allowed must be {[batch, rows, count]} or 1 in place of {batch}, got {[*allowed.shape]}.")
    # the kernel's offsets into it are 32-bit: it has no register to spare
    if allowed is not None and (rows - 1) * allowed.stride(1) + (count - 1) * allowed.stride(2) >= 2**31:
        raise ValueError(f"allowed of {rows} rows and {count} keys is too large for one call; hand in fewer rows.")
    if gate is not None and gate.shape != (batch, rows):
        raise ValueError(f"gate must be {[batch, rows]} here, got {[*gate.shape]}.")


def reference(
    query: Tensor, key: Tensor, value: Tensor, groups: Tensor, allowed: Tensor | None, gate: Tensor | None,
    share: float, least_mass: float, most_sink: float, slack: float, scale: float,
) -> Tensor:  # fmt: skip
    """`redistribute_attention` in PyTorch."""
    return _in_blocks(query, key, value, _plan(groups, share, least_mass, most_sink, slack), allowed, gate, scale)


def _direct(
    query: Tensor, key: Tensor, value: Tensor, groups: Tensor, allowed: Tensor | None, gate: Tensor | None,
    share: float, least_mass: float, most_sink: float, slack: float, scale: float,
) -> Tensor:  # fmt: skip
    """The reference, with the plan kept on the groups, which stay the same from one decoded token to the next."""
    plan = _kept_plan(groups, share, least_mass, most_sink, slack)
    return _in_blocks(query, key, value, plan, allowed, gate, scale)


def _in_blocks(
    query: Tensor, key: Tensor, value: Tensor, plan: _Plan, allowed: Tensor | None, gate: Tensor | None, scale: float
) -> Tensor:
    rows = query.shape[2]
    if rows <= _BLOCK:
        return _block(query, key, value, plan, allowed, gate, scale)
    parts = [
        _block(
            query[:, :, at : at + _BLOCK], key, value, plan,
            None if allowed is None else allowed[:, at : at + _BLOCK],
            None if gate is None else gate[:, at : at + _BLOCK],
            scale,
        )
        for at in range(0, rows, _BLOCK)
    ]  # fmt: skip
    return torch.cat(parts, dim=2)


def _block(
    query: Tensor, key: Tensor, value: Tensor, plan: _Plan, allowed: Tensor | None, gate: Tensor | None, scale: float
) -> Tensor:
    batch, heads, rows, width = query.shape
    kv, count = key.shape[1], key.shape[2]
    # the query heads of one key head become more rows of it, so no key is copied
    grouped = query.reshape(batch * kv, heads // kv * rows, width)
    keys = key.reshape(batch * kv, count, width).transpose(1, 2)
    scores = torch.baddbmm(query.new_empty(1, 1, 1), grouped, keys, beta=0, alpha=scale).float()
    if allowed is not None:
        scores = scores.view(batch, heads, rows, count)
        scores = scores.masked_fill(~allowed[:, None], torch.finfo(scores.dtype).min)
    weights = scores.view(batch, heads * rows, count).softmax(dim=-1)
    end = plan.columns.shape[1]
    known = weights[..., :end]
    sums = torch.bmm(known, plan.columns)  # [B, H R, 4]
    active = (sums[..., :3] >= plan.least).all(dim=-1, keepdim=True)
    if gate is not None:
        active = active & gate.repeat(1, heads)[..., None]
    normal, freed = sums[..., 2:3], sums[..., 3:]
    gain = freed / normal.clamp(min=torch.finfo(normal.dtype).tiny)
    changed = torch.addcmul(known, known, torch.addcmul(plan.loss, gain, plan.gain))
    weights = torch.cat([torch.where(active, changed, known), weights[..., end:]], dim=-1)
    out_width = value.shape[3]
    values = value.reshape(batch * kv, count, out_width)
    mixed = torch.bmm(weights.view(batch * kv, heads // kv * rows, count).to(value.dtype), values)
    return mixed.view(batch, heads, rows, out_width)


@dataclass(frozen=True)
class _Plan:
    """What follows from groups and settings alone, all fp32.

    Attributes:
        settings: that it was made for.
        columns: `[B, P, 4]`, weights of the keys in m_N + m_S, in most_sink (m_N + m_S) - m_S, in m_N and in m_S + m_T.
        least: `[B, 1, 3]`, what the first three must reach in a pair that is changed.
        gain, loss: `[B, 1, P]`, `share` at visual non-sinks, and -`share` at sinks.
    """

    settings: tuple[float, ...]
    columns: Tensor
    least: Tensor
    gain: Tensor
    loss: Tensor
    version: int | None = None  # of the groups that it was made for; tensors of inference mode have none


def _plan(groups: Tensor, share: float, least_mass: float, most_sink: float, slack: float) -> _Plan:
    normal, sink, text = ((groups == kind).float() for kind in (VISUAL, VISUAL_SINK, TEXT_SINK))
    visual = normal + sink
    columns = torch.stack([visual, most_sink * visual - sink, normal, sink + text], dim=-1)
    count = visual.sum(1, keepdim=True)
    # tiny: where no visual non-sink is seen, none can receive
    tiny = torch.full_like(count, torch.finfo(torch.float32).tiny)
    least = torch.stack([torch.full_like(count, least_mass), -most_sink * slack * count, tiny], dim=-1)
    settings = (share, least_mass, most_sink, slack)
    return _Plan(settings, columns, least, share * normal[:, None], -share * (sink + text)[:, None])


def _kept_plan(groups: Tensor, share: float, least_mass: float, most_sink: float, slack: float) -> _Plan:
    if is_in_torch_dispatch_mode():  # a plan of fake or traced tensors is of use to nobody else
        return _plan(groups, share, least_mass, most_sink, slack)
    plan: _Plan | None = getattr(groups, "_plan", None)
    version = None if groups.is_inference() else groups._version
    if plan is None or plan.settings != (share, least_mass, most_sink, slack) or plan.version != version:
        # a plan of inference mode would be of no use to autograd
        with torch.inference_mode(False):
            plan = replace(_plan(groups, share, least_mass, most_sink, slack), version=version)
        groups._plan = plan  # type: ignore[attr-defined]
    return plan


def launch(
    query: Tensor, key: Tensor, value: Tensor, groups: Tensor, allowed: Tensor | None, gate: Tensor | None,
    share: float, least_mass: float, most_sink: float, slack: float, scale: float,
) -> Tensor:  # fmt: skip
    """`redistribute_attention` in two launches."""
    _check(query, key, value, groups, allowed, gate)
    batch, heads, rows, width = query.shape
    key_heads, count, out_width = value.shape[1:]
    if not query.numel() or not count:
        return value.new_zeros(batch, heads, rows, out_width)
    group = heads // key_heads
    block_r, block_n, block_v = 16, 32, power_of_two(out_width, 16)
    blocks, tiles = ceil_div(group * rows, block_r), ceil_div(count, block_n)
    splits = min(tiles, ceil_div(_PROGRAMS, blocks * batch * key_heads))
    tiles_each = ceil_div(tiles, splits)
    splits = ceil_div(tiles, tiles_each)
    sums = query.new_empty(batch, heads, rows, splits, 5, dtype=torch.float32)
    vectors = query.new_empty(batch, heads, rows, splits, 3, out_width, dtype=torch.float32)
    seen = query if allowed is None else allowed.expand(batch, -1, -1)
    # wide fp32 tiles leave shared memory for one stage, and registers for eight warps
    stages = 2 if key.element_size() * max(block_v, power_of_two(width)) <= 256 else 1
    warps = 4 if key.element_size() == 2 else 8
    groups_kernel[(splits, blocks, batch * key_heads)](
        query, key, value, groups, seen, sums, vectors, scale, key_heads, group, rows, count, groups.shape[1], width,
        out_width, splits, tiles_each, *query.stride(), *key.stride(), *value.stride(), *groups.stride(),
        *(seen.stride()[:3]), allowed is not None, must_widen(query.dtype, key.dtype), must_widen(value.dtype),
        block_r, block_n, block_of_width(width, query.dtype, key.dtype), block_v, num_stages=stages, num_warps=warps,
    )  # fmt: skip
    out = value.new_empty(batch, heads, rows, out_width)
    opened = groups if gate is None else gate
    join_kernel[(batch * heads * rows,)](
        sums, vectors, groups, opened, out, share, least_mass, most_sink, slack, heads, rows, groups.shape[1], splits,
        out_width, *groups.stride(), *opened.stride(), gate is not None, slack != 0, power_of_two(splits), block_v,
    )  # fmt: skip
    return out


@Kernel
def groups_kernel(
    p_q, p_k, p_v, p_groups, p_mask, p_sums, p_vectors, scale, key_heads, group, rows, count, known, width, out_width,
    splits, tiles_each, q_b, q_h, q_r, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, g_b, g_n, m_b, m_r, m_n,
    MASKED: tl.constexpr, WIDEN_K: tl.constexpr, WIDEN_V: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Maximum, four sums of powers and three vectors of all query rows of a key head, over one part of the keys.
    Groups are 0 O, 1 N, 2 S, 3 T."""
    split = tl.program_id(0)
    batch = (tl.program_id(2) // key_heads).to(tl.int64)
    key_head = tl.program_id(2) % key_heads
    o_i = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_v = tl.arange(0, BLOCK_V)
    is_row = o_i < group * rows
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
            b_q = tl.load(p_q[:, None] + o_d[None] * q_d, mask=is_row[:, None] & inside[None], other=0.0)
            b_k = tl.load(p_k + o_n[None] * k_n + o_d[:, None] * k_d, mask=m_n_[None] & inside[:, None], other=0.0)
            if WIDEN_K:
                b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
            b_s += tl.dot(b_q, b_k, input_precision="tf32x3")
        seen = is_row[:, None] & m_n_[None]
        if MASKED:
            seen = seen & tl.load(p_mask + batch * m_b + row[:, None] * m_r + o_n[None] * m_n, mask=seen, other=0).to(
                tl.int1
            )
        b_s = tl.where(seen, b_s * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(b_s, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(peak - base)
        peak = higher
        # 2^14 cancels in the end; without it fp16 loses digits of small powers, which a large gain would show
        power = tl.exp(b_s - base[:, None]) * 16384.0
        kind = tl.load(p_groups + batch * g_b + o_n * g_n, mask=o_n < known, other=0)
        power_o = tl.where((kind == 0)[None], power, 0.0)
        power_n = tl.where((kind == 1)[None], power, 0.0)
        power_s = tl.where((kind == 2)[None], power, 0.0)
        power_t = tl.where((kind == 3)[None], power, 0.0)
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
    tl.store(p_sums, peak, mask=is_row)
    tl.store(p_sums + 1, z_s, mask=is_row)
    tl.store(p_sums + 2, z_n, mask=is_row)
    tl.store(p_sums + 3, z_t, mask=is_row)
    tl.store(p_sums + 4, z_o, mask=is_row)
    p_vectors += line[:, None] * 3 * out_width + o_v[None]
    inside_v = is_row[:, None] & (o_v < out_width)[None]
    tl.store(p_vectors, u_sinks, mask=inside_v)
    tl.store(p_vectors + out_width, u_n, mask=inside_v)
    tl.store(p_vectors + 2 * out_width, u_o, mask=inside_v)


@Kernel
def join_kernel(
    p_sums, p_vectors, p_groups, p_gate, p_out, share, least_mass, most_sink, slack, heads, rows, known, splits,
    out_width, g_b, g_n, open_b, open_r,
    GATED: tl.constexpr, SLACKED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row: the parts on one scale, the test, and the groups under their factors."""
    line = tl.program_id(0).to(tl.int64)
    o_s, o_v = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V)
    m_s = o_s < splits
    p_sums += line * splits * 5
    p_part = p_sums + o_s * 5
    b_peak = tl.load(p_part, mask=m_s, other=float("-inf"))
    peak = tl.max(b_peak, axis=0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    b_scale = tl.exp(b_peak - peak)
    z_s = tl.sum(b_scale * tl.load(p_part + 1, mask=m_s, other=0.0), axis=0)
    z_n = tl.sum(b_scale * tl.load(p_part + 2, mask=m_s, other=0.0), axis=0)
    z_t = tl.sum(b_scale * tl.load(p_part + 3, mask=m_s, other=0.0), axis=0)
    z_o = tl.sum(b_scale * tl.load(p_part + 4, mask=m_s, other=0.0), axis=0)
    total = z_s + z_n + z_t + z_o
    total = tl.where(total == 0.0, 1.0, total)
    in_picture = z_s + z_n
    # m_N > 0 as the reference tests it: at least the smallest normal number
    active = (in_picture >= least_mass * total) & (z_n >= 1.1754943508222875e-38 * total)  # type: ignore[operator]
    batch, row = line // (heads * rows), line % rows
    slacked = in_picture
    if SLACKED:
        visual = tl.zeros([1024], tl.float32)
        for first in range(0, known, 1024):
            o_n = first + tl.arange(0, 1024)
            kind = tl.load(p_groups + batch * g_b + o_n * g_n, mask=o_n < known, other=0)
            visual += ((kind == 1) | (kind == 2)).to(tl.float32)
        slacked = in_picture + slack * tl.sum(visual, axis=0) * total
    active = active & (z_s <= most_sink * slacked)
    if GATED:
        active = active & tl.load(p_gate + batch * open_b + row * open_r).to(tl.int1)
    shrunk = tl.where(active, 1.0 - share, 1.0)
    grown = tl.where(active, 1.0 + share * (z_s + z_t) / tl.where(active, z_n, 1.0), 1.0)
    b_out = tl.zeros([BLOCK_V], tl.float32)
    for split in range(splits):
        part = tl.exp(tl.load(p_sums + split * 5) - peak)
        p_u = p_vectors + (line * splits + split) * 3 * out_width + o_v
        u_sinks = tl.load(p_u, mask=o_v < out_width, other=0.0)
        u_n = tl.load(p_u + out_width, mask=o_v < out_width, other=0.0)
        u_o = tl.load(p_u + 2 * out_width, mask=o_v < out_width, other=0.0)
        b_out += part * (shrunk * u_sinks + grown * u_n + u_o)
    tl.store(p_out + line * out_width + o_v, (b_out / total).to(p_out.dtype.element_ty), mask=o_v < out_width)


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return value.new_empty(*query.shape[:3], value.shape[3])


def _flops(query: Tensor, key: Tensor, value: Tensor, groups: Tensor, *rest: object) -> int:
    """Of the reference: logits, four sums over keys of known groups, output."""
    batch, heads, rows, width = query.shape
    return 2 * batch * heads * rows * (key.shape[2] * (width + value.shape[3]) + 4 * groups.shape[1])


_OP = Op(
    "redistribute_attention(Tensor query, Tensor key, Tensor value, Tensor groups, Tensor? allowed, Tensor? gate, "
    "float share, float least_mass, float most_sink, float slack, float scale) -> Tensor",
    reference,
    launch,
    _fake,
    _flops,
    _direct,
)
