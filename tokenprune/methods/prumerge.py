"""Keeps the patches that stand out in [CLS]'s attention and adds to each those with like keys (PruMerge).

Paper: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", Shang et al., ICCV 2025,
https://arxiv.org/abs/2403.15388.
Official code: 42Shawn/LLaVA-PruMerge at 097c041.
Licence: Apache-2.0 upstream; this file was written from the formulas, no code was copied.

Attention is that of [CLS] in the last block of the tower, all heads taken as one (code): softmax of q k / sqrt(C). The
number kept by `count="outliers"` is floor(N x share of patches above Q3 + 1.5 IQR), as published; by "budget" it is the
budget, as tables at equal cost need it. To each kept token are added the 32 with the most similar keys of that block,
weighted by their attention, which is not brought to sum 1 (code).

    x_i' = x_i + sum_{j in near(i)} a_j x_j
    count = floor(N * share of j with a_j > Q3 + 1.5 (Q3 - Q1))

Deviations:
- Merging is of the tokens as the decoder gets them; the official code merges before the projector. Behind a linear
  projector the two are the same but for its bias.
- The one extra token (the sum of all that leave, weighted) is left out: it has no place in the picture (our choice).
- Tokens keep their raster order; the official code puts them in that of their attention.
- Quartiles are of each picture; the official code takes those of the batch.
- "outliers" never keeps more than the budget, and at least one.
- Without [CLS] the attention that patches receive, heads apart, stands in (our choice, labelled in reports).
- Published numbers are of checkpoints trained with it; without training it does worse (card).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, refuse_nan, topk_indices
from tokenprune.interfaces.signals import CLS_WIDE_ATTENTION, TOWER_KEYS, Signal, TowerInfo, summary_attention
from tokenprune.interfaces.view import View
from tokenprune.methods._key_merge import NEIGHBOURS, add_neighbours, add_neighbours_flops, outliers
from tokenprune.registry import near, register_method

COUNTS = ("budget", "outliers")


@register_method("prumerge")
@dataclass
class PruMerge(Pruner):
    """Ranks the patches `[M, N]` by attention and merges by keys `[M, N, C]`.

    Attributes:
        count: "budget" or "outliers", see above.
        neighbours: how many are added to each kept token, from 0 (none) on.
    """

    merges: ClassVar[bool] = True
    says_sizes: ClassVar[bool] = False
    published: ClassVar[str] = "arXiv 2403.15388, 42Shawn/LLaVA-PruMerge"
    reproduces: ClassVar[str] = (
        "LLaVA-1.5-7B at 64 of 576: GQA 51.9, POPE 65.3, TextVQA 54.0 (V2Drop paper, Table 1; how it held the budget "
        "is not known here)"
    )

    count: str = "budget"
    neighbours: int = NEIGHBOURS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count not in COUNTS:
            raise ValueError(f"count must be one of {', '.join(COUNTS)}, got {self.count!r}.{near(self.count, COUNTS)}")
        if isinstance(self.neighbours, bool) or not isinstance(self.neighbours, int) or self.neighbours < 0:
            raise ValueError(f"neighbours must be a number of tokens from 0 on, got {self.neighbours!r}.")

    @property
    def is_adaptive(self) -> bool:
        return self.count == "outliers"

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
        counts = None
        budget = view.budget
        kept = topk_indices(attention, budget)
        if self.count == "outliers":
            refuse_nan(attention)
            counts = outliers(attention).clamp(1, budget).tolist()
            budget = max(counts)
            kept = _ragged_topk(attention, counts, budget)
        return Selection(kept, add_neighbours(view.features, keys, attention, kept, self.neighbours), counts)

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        return add_neighbours_flops(num_images, num_tokens, keep, tower.hidden_size, self.neighbours)


def _ragged_topk(scores: Tensor, counts: list[int], width: int) -> Tensor:
    """`[M, width]`: of each row its own count of the highest, increasing; filled up with tokens that nobody reads."""
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :width]
    rank = scores.new_tensor(counts, dtype=order.dtype)[:, None]
    places = order.new_tensor(range(width))[None]
    # those that are not read sort behind all that are
    last = order.masked_fill(places >= rank, scores.shape[1]).sort(dim=1).values
    return last.clamp_max(scores.shape[1] - 1)
