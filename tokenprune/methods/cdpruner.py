"""Keeps tokens that are relevant to the question and unlike each other: a determinantal point process (CDPruner).

Paper: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", Zhang et al.,
NeurIPS 2025, https://arxiv.org/abs/2506.10967.
Official code: Theia-4869/CDPruner at 9541616.
Licence: Apache-2.0 upstream; this file was written from the formulas, no code was copied.

The kernel is r_i cos(x_i, x_j) r_j over the tokens as the decoder gets them; r is relevance, brought to (0, 1] by the
extremes. The set is the greedy maximum of its determinant: again and again the token whose vector has the largest part
outside of what the chosen ones span (Chen et al., 2018).

    L_ij = r_i cos(x_i, x_j) r_j
    S = argmax det L_S  over sets of k tokens, greedily

Relevance, by the option `relevance`:
- "embedding": cosine of each token with the mean embedding of the text behind the last visual token, from the
  decoder's table of embeddings. An extension of ours, for models without a text tower in the space of the pictures.
- "hint": numbers that the caller has, `handle.set_hints(relevance=[...])`, for each image or video one list with a
  number for each of its tokens, crop after crop. Published is
  minus the cosine of CLIP's patch features with CLIP's text features (on objects CLIP's are the other way round), which
  `tokenprune.clip_relevance` computes; the checkpoints of LLaVA hold no text tower.
- "none": every token alike; what is left is diversity.

Deviations:
- Extremes are those of each image; the official code takes those of the whole batch or stack of crops.
- Where what is left is spanned by the chosen ones (below 1e-5, where rounding decides), tokens come by index; the
  official square root of it can be NaN.
- Ties go to the lower raster index. The official code prunes crops by themselves, so does `scope="raster"`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, refuse_nan
from tokenprune.interfaces.signals import Signal, TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.methods._relevance import HINTS, NOTES, SIGNALS, TOKEN_HINTS, check_source, relevance_of
from tokenprune.registry import register_method

_WHOLE = 4096  # tokens; of more, rows of the kernel are computed when they are chosen: N^2 numbers are 600 MB of 12288
_LEAST = 1e-5  # of what is outside of the span, squared: below it, rounding is all that is left


@register_method("cdpruner")
@dataclass
class CdPruner(Pruner):
    """Picks k of N tokens `[M, N, D]` by relevance and diversity.

    Attributes:
        relevance: "embedding", "hint" or "none", see above.
    """

    text_aware: ClassVar[bool] = True
    token_hints: ClassVar[tuple[str, ...]] = TOKEN_HINTS
    published: ClassVar[str] = "arXiv 2506.10967, Theia-4869/CDPruner"
    reproduces: ClassVar[str] = (
        "LLaVA-1.5-7B at 64 of 576: 95.7 % of the unpruned average of 9 benchmarks (via arXiv 2602.05809), with CLIP's "
        "text tower"
    )

    relevance: str = "embedding"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_source(self.relevance)

    @property
    def needed_hints(self) -> tuple[str, ...]:
        return HINTS.get(self.relevance, ())

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        return SIGNALS.get(self.relevance, ())

    def notes(self, tower: TowerInfo) -> tuple[str, ...]:
        return NOTES.get(self.relevance, ())

    def scores(self, view: View) -> Tensor:
        """r, `[M, N]` fp32 in (0, 1]."""
        values = relevance_of(self.relevance, view)
        if values is None:
            return torch.ones_like(view.features[..., 0], dtype=torch.float32)
        low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
        return torch.where(high > low, (values - low + 1e-6) / (high - low).clamp_min(1e-12), 1.0)

    def order(self, view: View) -> Tensor:
        """`[M, k]` int64, the kept tokens in the order of choice: the first j are the choice for a budget of j."""
        refuse_nan(view.features)
        scores = self.scores(view)
        weighed = normalize(view.features.float(), dim=2) * scores[..., None]  # [M, N, D]
        if weighed.device.type != "cpu":
            return greedy(weighed, scores, view.budget)
        # one image at a time: the same bits in any batch, and the memory of one
        parts = zip(weighed.split(1), scores.split(1), strict=True)
        return torch.cat([greedy(one, score, view.budget) for one, score in parts])

    def select(self, view: View) -> Selection:
        return Selection(self.order(view).sort(dim=1).values)

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        relevance = 2 * num_tokens * width if self.relevance == "embedding" else 0
        steps = sum(2 * step * num_tokens for step in range(1, keep - 1))
        rows = keep - 1 if num_tokens > _WHOLE else num_tokens
        return num_images * (2 * rows * num_tokens * width + relevance + steps)


def greedy(weighed: Tensor, scores: Tensor, k: int) -> Tensor:
    """`greedy_determinant` of the products of rows `[M, N, D]` whose lengths are `scores` `[M, N]`."""
    diagonal = scores.square()  # so that equal relevance is equal to the last bit
    if weighed.shape[1] > _WHOLE:
        return greedy_determinant(diagonal, lambda best: _row(weighed, best), k)
    kernel = weighed @ weighed.transpose(1, 2)
    return greedy_determinant(diagonal, lambda best: take_row(kernel, best), k)


def take_row(table: Tensor, best: Tensor) -> Tensor:
    """`[M, N]`, row `best` `[M, 1]` of each of `[M, N, N]`."""
    return table.gather(1, best[..., None].expand(-1, 1, table.shape[2]))[:, 0]


def _row(weighed: Tensor, best: Tensor) -> Tensor:
    """`[M, N]`: products of all rows of `[M, N, D]` with row `best` `[M, 1]` of each."""
    own = weighed.gather(1, best[..., None].expand(-1, 1, weighed.shape[2]))
    return (weighed @ own.transpose(1, 2))[..., 0]


def greedy_determinant(diagonal: Tensor, row_of: Callable[[Tensor], Tensor], k: int) -> Tensor:
    """The greedy maximum of the determinant of k rows and columns, `[M, k]` int64 in the order of choice.

    Args:
        diagonal: `[M, N]` fp32, of positive semi-definite matrices.
        row_of: gives row `[M, 1]` int64 of each of them, `[M, N]`.
        k: 1 <= k <= N.
    """
    images, count = diagonal.shape
    left = diagonal.clone()  # [M, N], what is outside of the span, squared
    parts = diagonal.new_zeros(images, max(k - 1, 1), count)
    taken = torch.zeros_like(left, dtype=torch.bool)
    order: list[Tensor] = []
    for step in range(k):
        best = left.argmax(dim=1, keepdim=True)
        order.append(best)
        taken = taken.scatter(1, best, True)
        if step == k - 1:
            break
        row = row_of(best)
        if step:
            before = parts[:, :step]
            column = before.gather(2, best[:, None].expand(-1, step, 1))  # [M, step, 1]
            row = row - (column.transpose(1, 2) @ before)[:, 0]
        size = left.gather(1, best)
        part = torch.where(size > 0, row / size.clamp_min(_LEAST).sqrt(), 0)
        parts[:, step] = part
        left = left - part.square()
        left = torch.where(left > _LEAST, left, 0).masked_fill(taken, -torch.inf)
    return torch.cat(order, dim=1)
