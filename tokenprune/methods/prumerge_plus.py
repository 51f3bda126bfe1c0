"""PruMerge with tokens spread over the picture besides those that stand out (PruMerge+).

Paper, official code and licence: as of `prumerge`. There an evenly spaced list of patches, three of the size of what
stands out, joins the outliers; about a quarter of all tokens stays.

Here the budget is exact, as tables at equal cost need it: floor(k / 4) tokens, at least one, by attention, and the
others evenly spaced among those that remain, in raster order (our choice; conventions differ between papers, and the
official spacing cannot keep more than a share of it). Merging and all other deviations are those of `prumerge`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, refuse_nan, topk_indices
from tokenprune.interfaces.signals import CLS_WIDE_ATTENTION, TOWER_KEYS, Signal, TowerInfo, summary_attention
from tokenprune.interfaces.view import View
from tokenprune.methods._key_merge import NEIGHBOURS, add_neighbours, add_neighbours_flops
from tokenprune.registry import register_method


@register_method("prumerge_plus")
@dataclass
class PruMergePlus(Pruner):
    """Ranks a quarter of what stays by attention `[M, N]`, spreads the rest, and merges by keys `[M, N, C]`.

    Attributes:
        neighbours: how many are added to each kept token, from 0 (none) on.
    """

    merges: ClassVar[bool] = True
    says_sizes: ClassVar[bool] = False
    published: ClassVar[str] = "arXiv 2403.15388, 42Shawn/LLaVA-PruMerge"
    reproduces: ClassVar[str] = (
        "LLaVA-1.5-7B at 64 of 576: GQA 55.1, POPE 76.3, TextVQA 52.1 (EADP paper, Table 1; how it held the budget is "
        "not known here)"
    )

    neighbours: int = NEIGHBOURS

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.neighbours, bool) or not isinstance(self.neighbours, int) or self.neighbours < 0:
            raise ValueError(f"neighbours must be a number of tokens from 0 on, got {self.neighbours!r}.")

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        last = tower.num_layers - 1
        attention = Signal(CLS_WIDE_ATTENTION, last) if tower.has_cls else summary_attention(tower, last)
        return (attention, Signal(TOWER_KEYS, last))

    def notes(self, tower: TowerInfo) -> tuple[str, ...]:
        notes = ("merged behind the projector; published numbers are of a model trained with it",)
        if tower.has_cls:
            return notes
        return (*notes, "extension: no [CLS] in this tower, the attention that patches receive stands in")

    def select(self, view: View) -> Selection:
        attention, keys = (view.signal(s.name, s.layer, *s.settings) for s in self.signals(view.tower))
        refuse_nan(keys)
        kept = with_spread(topk_indices(attention, max(1, view.budget // 4)), view.num_tokens, view.budget)
        return Selection(kept, add_neighbours(view.features, keys, attention, kept, self.neighbours))

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        return add_neighbours_flops(num_images, num_tokens, keep, tower.hidden_size, self.neighbours)


def with_spread(first: Tensor, num_tokens: int, budget: int) -> Tensor:
    """The tokens `first` `[M, a]` (increasing) and budget - a of the others, evenly spaced among them: `[M, budget]`
    int64, increasing. Number j of s is at place floor((2 j + 1) r / (2 s)) of the r others."""
    images, chosen = first.shape
    others, wanted = num_tokens - chosen, budget - chosen
    is_first = torch.zeros(images, num_tokens, dtype=torch.int8, device=first.device).scatter_(1, first, 1)
    remaining = is_first.sort(dim=1, stable=True).indices[:, :others]  # [M, r], raster order
    places = (2 * torch.arange(wanted, device=first.device) + 1) * others // max(2 * wanted, 1)
    return torch.cat([first, remaining[:, places]], dim=1).sort(dim=1).values
