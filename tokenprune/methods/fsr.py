"""Keeps a focus of what is salient and relevant, scans the rest from there, and refines what it scanned (FSR).

Paper: "Focus-Scan-Refine: From Human Visual Perception to Efficient Visual Token Pruning", Tong et al.,
https://arxiv.org/abs/2602.05809 (Feb 2026).
Official code: none; ILOT-code/FSR at 26303db (5 Feb 2026) holds a README and pictures of tables, and no licence. The
formulas are those of the text as public reading notes restate them, so all of this is unverified against code.

Focus: phi = relevance^alpha saliency^beta, both brought to 0..1 over a picture; the fewest tokens that hold rho of the
sum of phi, the highest first. Scan: again and again the token whose nearest kept one is farthest, by cosine, until K
are kept. Refine: of the tokens that leave, kappa for each scanned one are absorbed, those most like some scanned one,
each by that one, with phi for weights; focus tokens stay as they are.

    phi_j = relevance_j^alpha * saliency_j^beta
    focus: the fewest tokens with sum phi >= rho * sum of all phi
    scan: s = argmin_i max_{j in S} cos(x_i, x_j)

Our choices, and deviations:
- Relevance by the option `relevance`: "embedding" (an extension, labelled in reports), "hint" (published: CLIP's text
  tower, `tokenprune.clip_relevance`), or "none", as published for Qwen2.5-VL. The text says cosine and cites CDPruner,
  whose code takes minus the cosine, as `clip_relevance` does: negate its numbers for the other reading.
- The product of relevance and saliency; one of the notes has a sum.
- Tokens are compared and merged as the decoder gets them, since what is merged goes there; saliency is [CLS]'s
  attention in the feature layer, without [CLS] the attention that patches receive. The text names neither.
- Where all tokens are equally salient or relevant that factor is 1. At most K tokens are focus.
- The weights of absorbed tokens add up, so their order does not matter; where all of a group weigh 0, they weigh alike.
- Kept tokens stand in raster order; ties go to the lower raster index. The kept ones' lengths are not restored.
- Several crops or pictures are ranked each alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, refuse_nan
from tokenprune.interfaces.signals import Signal, TowerInfo, summary_attention
from tokenprune.interfaces.view import View
from tokenprune.kernels.greedy_coverage import cosines
from tokenprune.kernels.merge import merge
from tokenprune.methods._relevance import HINTS, NOTES, SIGNALS, TOKEN_HINTS, check_source, relevance_of
from tokenprune.registry import register_method


@register_method("fsr")
@dataclass
class Fsr(Pruner):
    """Picks k of N tokens `[M, N, D]` and merges some that leave into those that are no focus.

    Attributes:
        relevance: "embedding", "hint" or "none", see above.
        alpha, beta: exponents of relevance and saliency, from 0 on; 3 and 1 in the paper.
        rho: share of the sum of phi that the focus holds, in [0, 1]; 0.9 in the paper.
        kappa: how many tokens are absorbed for each scanned one, from 0 on; 1 in the paper.
    """

    text_aware: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    token_hints: ClassVar[tuple[str, ...]] = TOKEN_HINTS
    published: ClassVar[str] = "arXiv 2602.05809, no official code"
    reproduces: ClassVar[str] = (
        "LLaVA-1.5-7B at 64 of 576: 96.1 % of the unpruned average of 9 benchmarks (arXiv 2602.05809), with CLIP's "
        "text tower"
    )

    relevance: str = "embedding"
    alpha: float = 3.0
    beta: float = 1.0
    rho: float = 0.9
    kappa: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_source(self.relevance)
        for name in ("alpha", "beta", "kappa"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0 on, got {getattr(self, name)!r}.")
        if not 0 <= self.rho <= 1:
            raise ValueError(f"rho must be a share of the sum of phi, from 0 to 1, got {self.rho!r}.")

    @property
    def needed_hints(self) -> tuple[str, ...]:
        return HINTS.get(self.relevance, ())

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        return (summary_attention(tower, tower.feature_layer), *SIGNALS.get(self.relevance, ()))

    def notes(self, tower: TowerInfo) -> tuple[str, ...]:
        stand_in = "extension: no [CLS] in this tower, the attention that patches receive stands in"
        return (*NOTES.get(self.relevance, ()), *(() if tower.has_cls else (stand_in,)))

    def phi(self, view: View) -> Tensor:
        """`[M, N]` fp32 in [0, 1]."""
        saliency = summary_attention(view.tower, view.tower.feature_layer)
        values = view.signal(saliency.name, saliency.layer, *saliency.settings)
        refuse_nan(values)
        phi = _from_0_to_1(values) ** self.beta
        relevance = relevance_of(self.relevance, view)
        return phi if relevance is None else phi * _from_0_to_1(relevance) ** self.alpha

    def select(self, view: View) -> Selection:
        refuse_nan(view.features)
        # one image at a time: the same bits in any batch
        table = torch.cat([cosines(one) for one in view.features.split(1)])
        phi, k = self.phi(view), view.budget
        ranked = phi.sort(dim=1, descending=True, stable=True)
        mass = ranked.values.cumsum(dim=1)
        in_focus = ((mass < self.rho * mass[:, -1:]).sum(dim=1, keepdim=True) + 1).clamp_max(k)  # [M, 1]
        order = focus_then_farthest(table, ranked.indices, in_focus, k)
        kept = order.sort(dim=1)
        scanned = kept.indices >= in_focus  # [M, k]
        goes_to = self._absorbed(table, kept.values, scanned)
        features, sizes = _merged(view.features, phi, kept.values, goes_to)
        return Selection(kept.values, features, sizes=sizes)

    def _absorbed(self, table: Tensor, kept: Tensor, scanned: Tensor) -> Tensor:
        """`[M, N]` int64, the place among the kept whose token absorbs this one; -1 for none."""
        images, count, _ = table.shape
        like = table.gather(2, kept[:, None].expand(-1, count, -1))  # [M, N, k]
        nearest = like.masked_fill(~scanned[:, None], -torch.inf).max(dim=2)  # the first of equal ones
        closeness = nearest.values.scatter(1, kept, -torch.inf)  # those that stay are absorbed by none
        places = torch.arange(count, device=table.device).expand(images, -1)
        rank = places.scatter(1, closeness.argsort(dim=1, descending=True, stable=True), places)
        wanted = (self.kappa * scanned.sum(dim=1, keepdim=True)).floor()
        return nearest.indices.masked_fill((rank >= wanted) | closeness.isinf(), -1)

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        relevance = 2 * num_tokens * width if self.relevance == "embedding" else 0
        return num_images * (2 * num_tokens**2 * width + relevance)


def _from_0_to_1(values: Tensor) -> Tensor:
    """Over the N of each image; 1 where all are the same."""
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (values - low) / torch.where(spread > 0, spread, 1), 1.0)


def focus_then_farthest(table: Tensor, ranked: Tensor, in_focus: Tensor, k: int) -> Tensor:
    """`[M, k]` int64 in the order of choice: the first of `ranked`, then each the one farthest from its nearest chosen.

    Args:
        table: `[M, N, N]` cosines.
        ranked: `[M, N]` int64, a permutation of the tokens.
        in_focus: `[M, 1]`, how many of each image come from `ranked`, from 1 to k.
    """
    images, count, _ = table.shape
    nearest = table.new_full((images, count), -torch.inf)
    order: list[Tensor] = []
    for step in range(k):
        best = torch.where(step < in_focus, ranked[:, step : step + 1], nearest.argmin(dim=1, keepdim=True))
        order.append(best)
        row = table.gather(1, best[..., None].expand(-1, 1, count))[:, 0]
        nearest = torch.maximum(nearest, row).scatter(1, best, torch.inf)
    return torch.cat(order, dim=1)


def _merged(features: Tensor, weights: Tensor, kept: Tensor, goes_to: Tensor) -> tuple[Tensor, Tensor]:
    """Kept tokens `[M, k, D]`, those that absorb none bit for bit, and how many each stands for `[M, k]`."""
    k = kept.shape[1]
    places = torch.arange(k, device=kept.device).expand_as(kept)
    target = goes_to.scatter(1, kept, places)  # each kept token is one of its own group
    groups = target.clamp_min(0)
    sizes = torch.zeros_like(kept, dtype=torch.float32).scatter_add(1, groups, (target >= 0).float())
    heaviest = torch.zeros_like(sizes).scatter_reduce(1, groups, weights.masked_fill(target < 0, 0), "amax")
    means = merge(features, target, k, torch.where(heaviest.gather(1, groups) > 0, weights, 1.0))
    own = features.gather(1, kept[..., None].expand(-1, -1, features.shape[2]))
    return torch.where(sizes[..., None] > 1, means, own), sizes
