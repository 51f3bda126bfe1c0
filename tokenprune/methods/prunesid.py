"""Groups tokens by principal components, drops near copies, and shares the budget by what is left (PruneSID).

Paper: "Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via Synergistic Importance-Diversity", Fang
et al., ICLR 2026, https://arxiv.org/abs/2603.09480 (only the abstract could be read).
Official code: ZhengyaoFang/PruneSID at 4ef17d9 (25 Mar 2026); what follows is the code's behaviour.
Licence: Apache-2.0 upstream; this file was written from the formulas, no code was copied.

1. Of the sigmoid of the hidden states, channels by tokens and centred by token, the first k / 4 right singular vectors:
   a token belongs to the group of the vector in which it is largest in magnitude.
2. Within a group, by importance: a token is suppressed where one ahead of it that is not has a cosine with it above
   theta = k / 32 times the mean cosine of all pairs. (Of 192 tokens theta is often above 1, and nothing is.)
3. Each group is bounded by what is not suppressed and by 5 ceil(k / 64); while the bounds do not add up to k, each
   grows by one, as far as its group goes. Every group gets one token; the rest is shared in proportion to what is not
   suppressed (cumulative rounding), within the bounds; what is then left goes to the groups with most of that.
4. A group gives its unsuppressed tokens first, then the suppressed ones, each by importance.

    group_j = argmax_m |v_mj|,  theta = k / 32 * mean_{i,j} cos(x_i, x_j)

On towers with [CLS] states are those behind the feature layer and importance is [CLS]'s attention there (code for
LLaVA). Without [CLS] (code for Qwen2-VL) states are the tokens as the decoder gets them, importance is the magnitude in
the vector of the group, there are at least 4 groups, and theta is max(18 k / N, 1) times the sum of the cosines of the
upper triangle, the diagonal included, over N^2.

Deviations:
- The decomposition is exact, in float64; the official one is randomised.
- Kept tokens are in raster order; the official code for LLaVA-1.5 leaves them by group.
- k counts patches alone. The official count includes [CLS], which is not kept here; formulas take k for it (our
  choice).
- The official Qwen code leaves pictures of up to 16 tokens whole, and keeps at least 16; here the budget holds always.
- There are never more groups than tokens that stay, and vectors of a singular value of zero (below 1e-6 of the largest)
  have no group: they are whatever the decomposition makes of them (our choice).
- Ties go to the lower raster index. Crops and frames are ranked each on its own, with their share of the budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, refuse_nan
from tokenprune.interfaces.signals import CLS_ATTENTION, TOWER_STATES, Signal, TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.registry import register_method

_CELLS = 1 << 22  # cosines at a time


@register_method("prunesid")
@dataclass
class PruneSid(Pruner):
    """Picks k of N tokens from their states `[M, N, C]` and, with [CLS], its attention `[M, N]`. No options."""

    published: ClassVar[str] = "arXiv 2603.09480, ZhengyaoFang/PruneSID"
    reproduces: ClassVar[str] = "LLaVA-1.5-7B at 64 of 576: 96.3 % of the unpruned average (arXiv 2603.09480, abstract)"

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        if not tower.has_cls:
            return ()
        return (Signal(CLS_ATTENTION, tower.feature_layer), Signal(TOWER_STATES, tower.feature_layer))

    def select(self, view: View) -> Selection:
        budget, count = view.budget, view.num_tokens
        if view.tower.has_cls:
            layer = view.tower.feature_layer
            attention, states = view.signal(CLS_ATTENTION, layer), view.signal(TOWER_STATES, layer)
            refuse_nan(attention)
            groups = max(1, budget // 4)
        else:
            attention, states = None, view.features
            groups = min(max(4, budget // 4), budget)
        refuse_nan(states)
        states = states.double()
        loading, group_of = principal_groups(states, min(groups, count))
        order = (
            (loading if attention is None else attention).sort(dim=1, descending=True, stable=True).indices
        )  # [M, N]
        parts = []
        for image, unit in enumerate(normalize(states, dim=2)):  # one at a time: N^2 flags are what it takes
            own, pairs = unit.square().sum(), count * (count - 1) / 2
            triangle = (unit.sum(dim=0).square().sum() - own) / 2  # of all cosines, without the diagonal
            if attention is None:
                threshold = max(18 * budget / count, 1.0) * (triangle + own) / count**2
            else:
                threshold = budget / 32 * triangle / pairs
            this = slice(image, image + 1)
            parts.append(survivors(near_copies(unit, threshold)[None], group_of[this], order[this]))
        kept = torch.cat(parts)
        return Selection(take(group_of, kept, order, min(groups, count), budget))

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        channels = tower.hidden_size if tower.has_cls else width
        small = min(num_tokens, channels)
        vectors = min(max(1 if tower.has_cls else 4, keep // 4), small)
        back = 2 * num_tokens * channels * vectors if channels < num_tokens else 0
        return num_images * (2 * small * small * max(num_tokens, channels) + back + 2 * num_tokens**2 * channels)


def principal_groups(states: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """In which of the first right singular vectors each token is largest.

    Args:
        states: `[M, N, C]` float64.
        groups: q, how many vectors, at most N.

    Returns:
        The magnitude there, and the number of the vector, `[M, N]` each. Signs of vectors do not matter.
    """
    table = states.sigmoid()
    table = table - table.mean(dim=2, keepdim=True)  # [M, N, C], centred over channels
    images, count, channels = table.shape
    parts = []
    for image in range(images):  # one at a time: the same bits in any batch
        one = table[image]
        if count <= channels:
            values, vectors = torch.linalg.eigh(one @ one.T)  # [N], [N, N], smallest first
            values, vectors = values[-groups:], vectors[:, -groups:]
        else:
            values, left = torch.linalg.eigh(one.T @ one)
            values, left = values[-groups:], left[:, -groups:]
            vectors = one @ left / values.clamp_min(1e-300).sqrt()  # [N, q], or C of them where q is more
        real = values > 1e-12 * values[-1:]  # squares of singular values
        vectors = torch.where(real, vectors, 0).flip(1)  # [N, q], largest first
        parts.append(vectors.abs())
    return torch.stack(parts).max(dim=2)  # type: ignore[return-value]


def near_copies(unit: Tensor, threshold: Tensor) -> Tensor:
    """`[N, N]` bool, where cosines are above a threshold, of rows `[N, C]` of length 1."""
    step = max(1, _CELLS // len(unit))
    return torch.cat([unit[start : start + step] @ unit.T > threshold for start in range(0, len(unit), step)])


def survivors(alike: Tensor, group_of: Tensor, order: Tensor) -> Tensor:
    """Which tokens no more important one of their group suppresses.

    Args:
        alike: `[M, N, N]` bool, whether two tokens are near copies.
        group_of: `[M, N]` int64.
        order: `[M, N]` int64, the most important first.

    Returns:
        `[M, N]` bool.
    """
    grouped = group_of.gather(1, order)
    alike = alike.gather(1, order[..., None].expand_as(alike)).gather(2, order[:, None].expand_as(alike))
    alike = alike & (grouped[:, :, None] == grouped[:, None])  # [M, N, N], in that order
    left = torch.ones_like(grouped, dtype=torch.bool)
    for place in range(grouped.shape[1] - 1):
        left[:, place + 1 :] &= ~(alike[:, place, place + 1 :] & left[:, place : place + 1])
    return torch.zeros_like(left).scatter(1, order, left)


def take(group_of: Tensor, kept: Tensor, order: Tensor, groups: int, budget: int) -> Tensor:
    """The tokens that the groups give, `[M, budget]` int64, increasing.

    Args:
        group_of: `[M, N]` int64, below `groups`.
        kept: `[M, N]` bool, not suppressed.
        order: `[M, N]` int64, the most important first.
    """
    images, count = group_of.shape
    empty = torch.zeros(images, groups, dtype=torch.int64, device=group_of.device)
    sizes = empty.scatter_add(1, group_of, torch.ones_like(group_of))
    unique = empty.scatter_add(1, group_of, kept.long())
    given = shares(sizes, unique, budget)  # [M, q]
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(count, device=order.device).expand(images, -1))
    key = (group_of * 2 + (~kept).long()) * count + rank
    sorted_by = key.sort(dim=1).indices  # by group, unsuppressed first, then by importance
    sorted_group = group_of.gather(1, sorted_by)
    start = sizes.cumsum(1) - sizes
    place = torch.arange(count, device=order.device) - start.gather(1, sorted_group)
    stays = place < given.gather(1, sorted_group)  # [M, N], as many as the budget in each row
    first = (~stays).to(torch.int8).sort(dim=1, stable=True).indices[:, :budget]
    return sorted_by.gather(1, first).sort(dim=1).values


def shares(sizes: Tensor, unique: Tensor, budget: int) -> Tensor:
    """How many tokens each group gives, `[M, q]` int64; they add up to the budget.

    Args:
        sizes, unique: `[M, q]` int64, tokens of each group, and those that are not suppressed.
    """
    least = sizes.clamp_max(1)
    bound = torch.minimum(unique, sizes).clamp_max(5 * math.ceil(budget / 64))  # [M, q]
    steps = torch.arange(budget + 1, device=sizes.device)
    grown = torch.minimum(bound[:, None] + steps[:, None], sizes[:, None]).sum(dim=2)  # [M, budget + 1]
    needed = (grown < budget).sum(dim=1, keepdim=True)  # the first step that is enough
    bound = torch.minimum(bound + needed, sizes)
    rest = (budget - least.sum(dim=1, keepdim=True)).clamp_min(0)
    parts = unique.double().cumsum(1) / unique.sum(dim=1, keepdim=True) * rest
    ends = parts.round().long()
    given = torch.minimum(ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1])) + least, bound)
    order = unique.sort(dim=1, descending=True, stable=True).indices
    room = (bound - given).gather(1, order)
    before = room.cumsum(1) - room
    more = torch.minimum((budget - given.sum(dim=1, keepdim=True) - before).clamp_min(0), room)
    return given.scatter_add(1, order, more)
