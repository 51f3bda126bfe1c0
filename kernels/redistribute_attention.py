"""Attention of a few query rows in which visual non-sinks receive a share of what sinks get: VAR in closed form.

Keys belong to four groups. With a_j the softmax weights of one row of one head and m_g the sum of a over group g,

    freed = share * (m_S + m_T)
    a'    = (1 - share) a on sinks,   a (1 + freed / m_N) on visual non-sinks,   a elsewhere

in the (head, row) pairs that look at the picture properly, and a' = a in all others. The weights still sum to 1, so the
softmax's own denominator stays. Only the rows that were asked for are formed, a block of them at a time: memory is
rows x keys and never keys x keys.
"""

from __future__ import annotations

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
    grouped = (query * scale).reshape(batch, kv, heads // kv * rows, width)
    scores = torch.matmul(grouped, key.transpose(2, 3)).float()
    if allowed is not None:
        seen = allowed[:, None, None].expand(-1, kv, heads // kv, -1, -1)
        scores = scores.view(batch, kv, -1, rows, count).masked_fill(~seen, torch.finfo(scores.dtype).min)
        scores = scores.view(batch, kv, -1, count)
    weights = scores.softmax(dim=-1)
    members = _members(groups)  # [B, 1, P, 3]
    known = weights[..., : groups.shape[1]]
    normal, visual_sink, text_sink = torch.matmul(known, members).unbind(-1)
    visual = normal + visual_sink
    most = visual if not slack else visual + slack * members[..., :2].sum((1, 2, 3))[:, None, None]
    active = (visual >= least_mass) & (visual_sink <= most_sink * most) & (normal > 0)
    if gate is not None:
        active = (active.view(batch, heads, rows) & gate[:, None]).view_as(active)
    loss = active * -share
    gain = loss * (visual_sink + text_sink) / normal.clamp(min=torch.finfo(normal.dtype).tiny)
    change = torch.matmul(torch.stack([-gain, loss, loss], dim=-1), members.transpose(2, 3))
    weights = torch.cat([known + known * change, weights[..., groups.shape[1] :]], dim=-1)
    return torch.matmul(weights.to(value.dtype), value).view(batch, heads, rows, width)


def _members(groups: Tensor) -> Tensor:
    """`[B, 1, P, 3]` fp32, 1 where a key is a visual non-sink, a visual sink, a text sink; kept with the groups, which
    stay the same from one decoded token to the next."""
    found = getattr(groups, "_members", None)
    if found is None:
        codes = torch.tensor([VISUAL, VISUAL_SINK, TEXT_SINK], dtype=groups.dtype, device=groups.device)
        found = (groups[:, :, None] == codes).float()[:, None]
        groups._members = found  # type: ignore[attr-defined]
    return found
