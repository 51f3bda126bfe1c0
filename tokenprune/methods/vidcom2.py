"""Gives frames that differ from the video more tokens, and keeps in each what differs most (VidCom2).

Paper: "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models", Liu et al.,
EMNLP 2025, https://arxiv.org/abs/2505.14454 (its README was read, not the paper).
Official code: xuyang-liu16/VidCom2 at 944a17d (15 May 2026).
Licence: Apache-2.0 upstream; this file was written from the formulas, no code was copied.

On the half of the channels that vary least over the video's tokens, brought to length 1: likeness of a token to a
centre is the sum of exp(-|x - c|^2 / 2 a) over a = 1/8, 1/4, 1/2, 1, 2. A frame is as unique as its tokens are
unlike the mean of all; a softmax of that at temperature 0.01 shifts its rate r (1 + p - mean p), at most 1. In each
frame the tokens least like the mean of all and the mean of their frame stay (code).

    K(x, c) = sum_a exp(-|x - c|^2 / 2 a),  a = 1/8, 1/4, 1/2, 1, 2
    r_f = min(1, r (1 + p_f - mean p))

`total="exact"` (ours) deals the budget so that the counts are nearest to those rates and add up to it, at least one a
frame; `total="official"` rounds each frame by itself, so that the total is about the budget.

Deviations:
- Pictures count as a frame, their crops as one each; the official code leaves pictures as they are.
- Where an earlier cut left, frames are of the tokens that are left.
- Ties go to the lower index. Row-end tokens of LLaVA-Video leave with the first cut, as everywhere here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, refuse_nan
from tokenprune.interfaces.signals import TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.methods._frames import deal, raster_numbers
from tokenprune.registry import near, register_method

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
TEMPERATURE = 0.01
TOTALS = ("exact", "official")


@register_method("vidcom2")
@dataclass
class VidCom2(Pruner):
    """Picks k of the tokens of a video `[M, N, D]`, frame by frame.

    Attributes:
        total: "exact" or "official", see above.
    """

    default_scope: ClassVar[str] = "visual"
    published_positions: ClassVar[str] = "keep"
    published: ClassVar[str] = "arXiv 2505.14454, xuyang-liu16/VidCom2"
    reproduces: ClassVar[str] = "LLaVA-OneVision-7B at 25 % of the tokens: 99.6 % of the unpruned average (README)"

    total: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total not in TOTALS:
            raise ValueError(f"total must be one of {', '.join(TOTALS)}, got {self.total!r}.{near(self.total, TOTALS)}")

    @property
    def is_adaptive(self) -> bool:
        return self.total == "official"

    def likeness(self, view: View) -> tuple[Tensor, Tensor, Tensor]:
        """Likeness of each token to the mean of all and to that of its frame, `[M, N]` each, and the rate of each
        frame over r, `[M, F]`."""
        features = view.features.float()
        refuse_nan(features)
        channels = features.var(dim=1).sort(dim=1, stable=True).indices[:, : max(1, features.shape[2] // 2)]
        x = normalize(features.gather(2, channels[:, None].expand(-1, features.shape[1], -1)), dim=2)  # [M, N, d / 2]
        group_of = raster_numbers(view)
        frames = len(view.rasters)
        index = group_of[..., None].expand_as(x)
        sizes = torch.zeros(len(x), frames, device=x.device).scatter_add(1, group_of, torch.ones_like(x[..., 0]))
        means = torch.zeros(len(x), frames, x.shape[2], device=x.device).scatter_add(1, index, x)
        means = means / sizes.clamp_min(1)[..., None]
        to_all = _kernel(x, x.mean(dim=1, keepdim=True))
        to_frame = _kernel(x, means.gather(1, index))
        alike = torch.zeros_like(sizes).scatter_add(1, group_of, to_all) / sizes.clamp_min(1)  # [M, F]
        unique = (-alike).masked_fill(sizes == 0, -torch.inf)
        share = ((unique - unique.amax(dim=1, keepdim=True)) / TEMPERATURE).softmax(dim=1)
        mean = share.sum(dim=1, keepdim=True) / (sizes > 0).sum(dim=1, keepdim=True)  # of the frames that are left
        return to_all, to_frame, 1 + share - mean

    def select(self, view: View) -> Selection:
        if not 0 < view.budget < view.num_tokens:
            return Selection(torch.arange(view.budget, device=view.features.device).expand(view.num_images, -1))
        to_all, to_frame, rates = self.likeness(view)
        group_of = raster_numbers(view)
        ratio = view.budget / view.num_tokens
        sizes = torch.zeros_like(rates).scatter_add(1, group_of, torch.ones_like(to_all))
        shares = (ratio * rates).clamp_max(1) * sizes
        score = -(to_all + to_frame)
        if self.total == "exact":
            return Selection(deal(score, group_of, shares, view.budget))
        counts = shares.round().clamp_min(1).minimum(sizes).long()  # [M, F]
        stays = _first(score, group_of, counts)
        totals = counts.sum(dim=1).tolist()
        order = (~stays).to(torch.int8).sort(dim=1, stable=True).indices[:, : max(totals)]
        kept = order.masked_fill(~stays.gather(1, order), view.num_tokens - 1)
        return Selection(kept, counts=totals)

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        return 0


def _kernel(x: Tensor, centre: Tensor) -> Tensor:
    distance = (x - centre).square().sum(dim=2)
    return torch.stack([(-distance / (2 * width)).exp() for width in WIDTHS]).sum(dim=0)


def _first(score: Tensor, group_of: Tensor, counts: Tensor) -> Tensor:
    """`[M, N]` bool: the highest `counts` `[M, F]` of each group."""
    order = score.sort(dim=1, descending=True, stable=True).indices
    grouped = group_of.gather(1, order).sort(dim=1, stable=True)
    order = order.gather(1, grouped.indices)
    sizes = torch.zeros_like(counts).scatter_add(1, group_of, torch.ones_like(group_of))
    place = torch.arange(order.shape[1], device=order.device) - (sizes.cumsum(1) - sizes).gather(1, grouped.values)
    return torch.zeros_like(group_of, dtype=torch.bool).scatter(1, order, place < counts.gather(1, grouped.values))
