"""Attention of a few query rows in which visual non-sinks receive a share of what sinks get: VAR in closed form.

Keys belong to four groups. With a_j the softmax weights of one row of one head and m_g the sum of a over group g,

    freed = share * (m_S + m_T)
    a'    = (1 - share) a on sinks,   a (1 + freed / m_N) on visual non-sinks,   a elsewhere

in the (head, row) pairs that look at the picture properly, and a' = a in all others. The weights still sum to 1, so the
softmax's own denominator stays. Only the rows that were asked for are formed, a block of them at a time: memory is
rows x keys and never keys x keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OTHER, VISUAL, VISUAL_SINK, TEXT_SINK = range(4)
"""Groups of keys: text and all that came later (O), visual non-sinks (N), visual sinks (S), text sinks (T)."""

_BLOCK = 64  # query rows at a time


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
        allowed: `[B or 1, R, K]` bool, True where a row sees a key, one key at least; None: every row sees all keys.
        gate: `[B, R]` bool, rows that may be changed; None: all.
        share: part of the sinks' attention that moves, in [0, 1].
        least_mass: attention that the picture must get in all.
        most_sink: part of the picture's attention that its sinks may have at most.
        slack: added per visual key to the picture's attention in that test.
        scale: what the dot products are multiplied by.

    Returns:
        `[B, H, R, d]` in the dtype of `value`.
    """
    batch, heads, rows, width = query.shape
    if rows > _BLOCK:
        parts = [
            redistribute_attention(
                query[:, :, at : at + _BLOCK], key, value, groups,
                None if allowed is None else allowed[:, at : at + _BLOCK],
                None if gate is None else gate[:, at : at + _BLOCK],
                share=share, least_mass=least_mass, most_sink=most_sink, slack=slack, scale=scale,
            )
            for at in range(0, rows, _BLOCK)
        ]  # fmt: skip
        return torch.cat(parts, dim=2)
    kv, count = key.shape[1], key.shape[2]
    # the query heads of one key head become more rows of it, so no key is copied
    grouped = query.reshape(batch * kv, -1, width)
    keys = key.reshape(batch * kv, count, width).transpose(1, 2)
    scores = torch.baddbmm(query.new_empty(1, 1, 1), grouped, keys, beta=0, alpha=scale).float()
    if allowed is not None:
        scores = scores.view(batch, heads, rows, count)
        scores = scores.masked_fill(~allowed[:, None], torch.finfo(scores.dtype).min)
    weights = scores.view(batch, heads * rows, count).softmax(dim=-1)
    plan = _plan(groups, share, least_mass, most_sink, slack)
    known = weights[..., : groups.shape[1]]
    sums = torch.bmm(known, plan.columns)  # [B, H R, 4]
    active = (sums[..., :3] >= plan.least).all(dim=-1, keepdim=True)
    if gate is not None:
        active = active & gate.repeat(1, heads)[..., None]
    normal, freed = sums[..., 2:3], sums[..., 3:]
    gain = freed / normal.clamp(min=torch.finfo(normal.dtype).tiny)
    changed = torch.addcmul(known, known, torch.addcmul(plan.loss, gain, plan.gain))
    weights = torch.cat([torch.where(active, changed, known), weights[..., groups.shape[1] :]], dim=-1)
    values = value.reshape(batch * kv, count, -1)
    return torch.bmm(weights.view(batch * kv, -1, count).to(value.dtype), values).view(batch, heads, rows, -1)


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


def _plan(groups: Tensor, share: float, least_mass: float, most_sink: float, slack: float) -> _Plan:
    """Kept with the groups, which stay the same from one decoded token to the next."""
    settings = (share, least_mass, most_sink, slack)
    found: _Plan | None = getattr(groups, "_plan", None)
    if found is None or found.settings != settings:
        normal, sink, text = ((groups == kind).float() for kind in (VISUAL, VISUAL_SINK, TEXT_SINK))
        visual = normal + sink
        columns = torch.stack([visual, most_sink * visual - sink, normal, sink + text], dim=-1)
        count = visual.sum(1, keepdim=True)
        # tiny: where no visual non-sink is seen, none can receive
        tiny = torch.full_like(count, torch.finfo(torch.float32).tiny)
        least = torch.stack([torch.full_like(count, least_mass), -most_sink * slack * count, tiny], dim=-1)
        found = _Plan(settings, columns, least, share * normal[:, None], -share * (sink + text)[:, None])
        groups._plan = found  # type: ignore[attr-defined]
    return found
