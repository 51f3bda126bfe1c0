"""Keeps diverse tokens that few heads look at, merges the rest into them, and weighs them in attention (ERA).

Paper: "ERA: Entropy-Guided Visual Token Pruning with Rectified Attention for Efficient MLLMs", Wang et al.,
https://arxiv.org/abs/2606.31982.
Official code: 924973292/ERA at 8639fe3 holds no code, only figures and images of tables.
Licence: MIT upstream; this file was written from the formulas in the figures, no code was copied.

Evidence: a reconstruction. The paper's text was not read. Steps marked (fig) are in the figures; the others are our
choice, so the published tables are no promise of this file.

Attention a_hi of [CLS] (on towers without one: of all patches) to token i by head h, H heads, in the block that makes
the visual tokens; x the embeddings that the LLM would get.

Anchors (DEP):
1. y_ih = a_hi / sum_h a_hi (fig: a softmax over heads; of probabilities near 0 it would be even to 1e-6, and the
   plotted spread is not). A token that no head looks at is even.
2. e_i = - sum_h y_ih log y_ih / log H, in [0, 1] (fig: the entropy; the scale is ours). Low: only some heads look.
3. f_i = [x_i / |x_i|, beta y_i / |y_i|], of length 1. The first anchor has the smallest e, then again and again the
   token with the largest min over anchors of 1 - cos(f_i, f_j), less entropy_weight e_i (fig: both views and a
   penalised greedy search; its formula could not be read).
Merging (BTR, fig):
4. Each other token goes to the anchor with the largest cosine between the x; x'_k is the mean of a cluster, the anchor
   among it.
5. b_k = 1 + sum of w_u over the others of the cluster, w_u = s_u = 1 - e_u, or, with `gamma`, in proportion to s_u with
   a sum of gamma (N - K) (the scale of w could not be read). `cap` bounds b, as a large one makes a sink of its anchor.
Attention (LAR, fig): log b_k on the logits of the anchor's key, for all queries, in all layers, see `key_bias`.

Further choices of ours:
- An image or video is chosen among as a whole, its crops or frames together.
- Features that are added inside the decoder (DeepStack) are those of the anchors alone.
- Ties go to the lower raster index and the lower anchor; a token of length zero has cosine 0 with all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, refuse_nan
from tokenprune.interfaces.signals import ATTENTION_BY_HEAD, Signal, TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.kernels.merge import merge
from tokenprune.registry import register_method

_TINY = 1e-12


def head_entropy(attention: Tensor) -> tuple[Tensor, Tensor]:
    """How evenly the heads look at a token.

    Args:
        attention: `[..., H]` fp32, at least 0.

    Returns:
        y `[..., H]`, shares of the heads, and e `[...]` in [0, 1], both fp64: 1 - e is a small difference.
    """
    heads, attention = attention.shape[-1], attention.double()
    total = attention.sum(dim=-1, keepdim=True)
    share = torch.where(total > 0, attention / total.clamp_min(torch.finfo(total.dtype).tiny), 1 / heads)
    if heads == 1:
        return share, torch.zeros_like(total[..., 0])
    return share, (torch.special.entr(share).sum(dim=-1) / math.log(heads)).clamp(0, 1)


def _unit(rows: Tensor) -> Tensor:
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(_TINY)


def _gram(rows: Tensor) -> Tensor:
    """`[M, N, N]`, image by image, so that a batch gives the bits of its images alone."""
    return torch.stack([image @ image.T for image in rows])


def _first_largest(values: Tensor) -> Tensor:
    """Where the largest of the last dimension first stands."""
    at = torch.arange(values.shape[-1], device=values.device)
    return torch.where(values == values.amax(dim=-1, keepdim=True), at, values.shape[-1]).amin(dim=-1)


def anchors(cosine: Tensor, entropy: Tensor, count: int, weight: float) -> Tensor:
    """`[M, K]` int64, increasing: tokens far from each other, with little entropy.

    Args:
        cosine: `[M, N, N]` between tokens.
        entropy: `[M, N]`.
        count: K.
        weight: of the entropy.
    """
    images = torch.arange(len(cosine), device=cosine.device)
    chosen = [_first_largest(-entropy)]
    nearest = torch.full_like(entropy, -torch.inf)  # largest cosine with an anchor
    for _ in range(count - 1):
        nearest = nearest.maximum(cosine[images, chosen[-1]]).scatter(1, chosen[-1][:, None], torch.inf)
        chosen.append(_first_largest(1 - nearest - weight * entropy))
    return torch.stack(chosen, dim=1).sort(dim=1).values


@register_method("era")
@dataclass
class ERA(Pruner):
    """K anchors of `[N, D]`, each the mean of its cluster, whose keys weigh as much as the cluster is salient.

    Attributes:
        beta: weight of the heads' shares beside the embedding in the distance, at least 0.
        entropy_weight: lambda, what entropy costs in the search, at least 0.
        gamma: sum of the weights that clusters gain, over the number of merged tokens; above 0. None: each token gains
            its cluster 1 - e.
        cap: largest b, at least 1; None: no bound.
    """

    default_scope: ClassVar[str] = "visual"
    merges: ClassVar[bool] = True
    default_key_bias: ClassVar[bool] = True
    published: ClassVar[str] = "arXiv 2606.31982, 924973292/ERA without code (reconstruction)"

    beta: float = 1.0
    entropy_weight: float = 0.5
    gamma: float | None = None
    cap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "entropy_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a weight of at least 0, got {getattr(self, name)!r}.")
        if self.gamma is not None and not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma must be a number above 0, got {self.gamma!r}.")
        if self.cap is not None and not 1 <= self.cap < math.inf:
            raise ValueError(f"cap must be a size of at least 1, got {self.cap!r}.")

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        return (Signal(ATTENTION_BY_HEAD, tower.feature_layer),)

    def notes(self, tower: TowerInfo) -> tuple[str, ...]:
        notes = ["reconstruction from figures: the paper's text was not read, and there is no code"]
        if not tower.has_cls:
            notes.append("received attention stands in for [CLS] attention")
        return tuple(notes)

    def select(self, view: View) -> Selection:
        attention = view.signal(ATTENTION_BY_HEAD, view.tower.feature_layer)  # [M, N, H]
        refuse_nan(attention)
        refuse_nan(view.features)
        share, entropy = head_entropy(attention)
        alike = _gram(_unit(view.features.float()))  # [M, N, N] of the embeddings
        heads = _gram(_unit(share.float()))
        joined = alike + self.beta**2 * heads
        length = joined.diagonal(dim1=1, dim2=2).clamp_min(_TINY).sqrt()  # of f
        kept = anchors(
            joined / (length[:, None] * length[:, :, None]), entropy.float(), view.budget, self.entropy_weight
        )
        cluster = _clusters(alike, kept)
        merged = merge(view.features, cluster, view.budget)
        sizes = self._sizes(entropy, cluster, kept)
        left = torch.full((len(kept),), view.num_tokens - view.budget, device=kept.device)
        return Selection(kept, merged, sizes=sizes, merged=left)

    def _sizes(self, entropy: Tensor, cluster: Tensor, kept: Tensor) -> Tensor:
        """b, `[M, K]`."""
        gained = (1 - entropy).scatter(1, kept, 0.0)  # s, of tokens that leave
        if self.gamma is not None:
            total = gained.sum(dim=1, keepdim=True)
            even = torch.ones_like(gained).scatter(1, kept, 0.0)
            gained = torch.where(total > 0, gained, even)
            wanted = self.gamma * (entropy.shape[1] - kept.shape[1])
            gained = gained * (wanted / gained.sum(dim=1, keepdim=True))
        sizes = torch.ones(kept.shape, dtype=gained.dtype, device=kept.device).scatter_add(1, cluster, gained).float()
        return sizes if self.cap is None else sizes.clamp_max(self.cap)

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        return 2 * num_images * num_tokens**2 * (width + tower.num_heads)


def _clusters(cosine: Tensor, kept: Tensor) -> Tensor:
    """`[M, N]` int64: which of the anchors `kept` `[M, K]` each token goes to, by cosine `[M, N, N]`."""
    to_anchors = cosine.gather(2, kept[:, None].expand(-1, cosine.shape[1], -1))
    cluster = _first_largest(to_anchors)
    own = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return cluster.scatter(1, kept, own)
