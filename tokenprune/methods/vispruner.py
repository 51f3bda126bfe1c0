"""Keeps what [CLS] attends to most, and of the rest what is least alike, thinned out round by round (VisPruner).

Paper: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in Vision-Language Models",
Zhang et al., ICCV 2025, https://arxiv.org/abs/2412.01818.
Official code: Theia-4869/VisPruner at aefa01a.
Licence: Apache-2.0 upstream; this file was written from the formulas, no code was copied.

Of k tokens, floor(r k) are those with the highest [CLS] attention of the feature layer, mean over heads (code). The
others, in the order of their attention, are thinned out: every other one (a) is compared with those between (b); the up
to 8 of a that have the most similar one in b leave, those of a that stay come first, the most similar ahead, then b in
its order. This goes on until k - floor(r k) are left. Similarity is the cosine of the hidden states behind the feature
layer (code). The order inside the rest changes which are compared next, so it is that of the code.

Deviations:
- With an odd number of tokens in a round the official code loses one more (it gathers half of them, rounded down); here
  all stay that were not dropped. On 576 patches and even shares the rounds are even and the two agree.
- Selection happens after the projector, on tokens that are the same up to float error.
- Ties go to the token that comes first in the order of its list, and in that of attention to the lower raster index.
- Without [CLS] the attention that patches receive from all patches stands in (our choice, labelled in reports).
- Crops, thumbnails and frames are ranked each on its own, with their share of the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, refuse_nan
from tokenprune.interfaces.signals import TOWER_STATES, Signal, TowerInfo, summary_attention
from tokenprune.interfaces.view import View
from tokenprune.registry import register_method

ROUND = 8
"""Most tokens that leave in one round (code)."""


@register_method("vispruner")
@dataclass
class VisPruner(Pruner):
    """Picks k of N tokens: a share by attention `[M, N]`, the rest by how little alike their states `[M, N, C]` are.

    Attributes:
        important: r, the share of the kept tokens that attention chooses, in [0, 1]; 0.5 is the code's default, its
            README also uses 0.75.
    """

    published: ClassVar[str] = "arXiv 2412.01818, Theia-4869/VisPruner"
    reproduces: ClassVar[str] = (
        "LLaVA-1.5-7B at 64 of 576: GQA 55.8, POPE 80.5, TextVQA 55.6 (re-run in one environment: arXiv 2606.01711, "
        "Table 1)"
    )

    important: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.important, bool) or not 0 <= self.important <= 1:
            raise ValueError(f"important must be a share of the kept tokens in [0, 1], got {self.important!r}.")

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        layer = tower.feature_layer
        return (summary_attention(tower, layer), Signal(TOWER_STATES, layer))

    def notes(self, tower: TowerInfo) -> tuple[str, ...]:
        if tower.has_cls:
            return ()
        return ("extension: no [CLS] in this tower, the attention that patches receive stands in",)

    def select(self, view: View) -> Selection:
        attention, states = (view.signal(s.name, s.layer, *s.settings) for s in self.signals(view.tower))
        for values in (attention, states):
            refuse_nan(values)
        order = attention.sort(dim=1, descending=True, stable=True).indices  # [M, N]
        first = int(view.budget * self.important)
        rest = thin_out(normalize(states, dim=2), order[:, first:], view.budget - first)
        return Selection(torch.cat([order[:, :first], rest], dim=1).sort(dim=1).values)

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        first = int(keep * self.important)
        left, total = num_tokens - first, 0
        while left > keep - first > 0:
            total += 2 * ((left + 1) // 2) * (left // 2) * tower.hidden_size
            left -= _leaving(left, keep - first)
        return num_images * total


def _leaving(left: int, wanted: int) -> int:
    return min(ROUND, left - wanted, (left + 1) // 2)


def thin_out(states: Tensor, order: Tensor, wanted: int) -> Tensor:
    """Those of a list that are left when the most similar ones have gone, round by round.

    Args:
        states: `[M, N, C]`, of length 1.
        order: `[M, R]` int64, the list.
        wanted: how many shall be left.

    Returns:
        `[M, wanted]` int64, not sorted.
    """
    if wanted == 0:
        return order[:, :0]
    while order.shape[1] > wanted:
        even, odd = order[:, 0::2], order[:, 1::2]
        of_even, of_odd = (
            states.gather(1, part[..., None].expand(-1, -1, states.shape[2])) for part in (even, odd)
        )  # [M, ceil(R / 2), C], [M, R // 2, C]
        alike = (of_even @ of_odd.transpose(1, 2)).amax(dim=2)
        ranked = even.gather(1, alike.sort(dim=1, descending=True, stable=True).indices)
        order = torch.cat([ranked[:, _leaving(order.shape[1], wanted) :], odd], dim=1)
    return order
