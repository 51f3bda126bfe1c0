"""Keeps the tokens that [CLS] looks at most, and merges the others by clusters (VMTC; a reconstruction).

Paper: "Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image Redundancy", Yang et al.,
https://arxiv.org/abs/2411.15453.
Official code: none found. Licence: none needed, this file was written from the card's formulas.

Evidence: a reconstruction. The paper's body was not read; that the tokens with the highest [CLS] attention (IPS) stay
and the others are clustered by k-means under cosine similarity and merged by IPS comes from summaries of the paper. All
numbers and the rest are our choice, so no published number is owed. The paper's other half, CMAI, takes no token away
and is not here.

1. a_i: attention of [CLS] to patch i, mean over heads, in the block that makes the visual tokens; on towers without
   [CLS] the attention that a patch gets from all patches (our choice).
2. The k tokens with the largest a stay as they are. k : c = 3 : 1, k = 3/4 of the budget, rounded, halves up; a budget
   of two or more has at least one cluster, a budget of one has none and drops the rest (our choice).
3. Spherical k-means on the others, as unit vectors. Seeds: the one with the largest a, then again and again the one
   farthest from all seeds. Ten times: each goes to the centre with the largest cosine, and centres become the unit
   means of their members. A cluster without members takes the token that fits its own worst, of those that are not
   the best of theirs; several take the next ones (our choice).
4. f_G = sum a_i f_i / sum a_i over a cluster, of the features as they are; equal weights where the sum is below 1e-8.
5. placement "slot": a merged token stands where its cluster's member with the largest a stood. "append" (the other
   plausible reading): all kept tokens first, then the merged ones in the order of those slots; the places that the
   Selection names are then those of the row, not of the tokens, and position ids must close up.

Further choices of ours:
- Merging works on the embeddings that the LLM would get, behind the projector, where every family has them; the card
  puts it before the projector.
- Each crop or frame alone, with its share of the budget; row-end tokens leave as with every method.
- `key_bias` is off; switched on, a merged token weighs as many as its cluster has.
- Ties go to the lower raster index and the earlier cluster. A token of length zero has cosine 0 with all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, refuse_nan, topk_indices
from tokenprune.interfaces.signals import Signal, TowerInfo, summary_attention
from tokenprune.interfaces.view import View
from tokenprune.kernels.merge import merge
from tokenprune.registry import register_method

PLACEMENTS = ("slot", "append")

_ROUNDS = 10
_NOTHING = 1e-8  # of attention, below which a cluster's weights are equal
_TINY = 1e-12


def kept_and_clusters(budget: int) -> tuple[int, int]:
    """How many tokens stay as they are, and how many clusters the others form."""
    kept = min((3 * budget + 2) // 4, max(budget - 1, 1))
    return kept, budget - kept


def clusters_of(unit: Tensor, importance: Tensor, count: int) -> Tensor:
    """Spherical k-means with seeds that do not depend on chance; every cluster has a member.

    Args:
        unit: `[M, R, D]` fp32, rows of length 1 or 0.
        importance: `[M, R]` fp32, the largest of which is the first seed.
        count: c, 1 <= c <= R.

    Returns:
        `[M, R]` int64, the cluster of each token.
    """
    centres = _seeds(unit, importance, count)
    cluster = torch.zeros(unit.shape[:2], dtype=torch.int64, device=unit.device)
    for _ in range(_ROUNDS):
        cosines = torch.stack([rows @ of.T for rows, of in zip(unit, centres)])  # [M, R, c]
        fit, cluster = _first_largest(cosines)
        cluster = _filled(cluster, fit, count)
        wide = cluster[..., None].expand_as(unit)
        sums = torch.zeros_like(centres).scatter_add(1, wide, unit)
        centres = _unit(sums)
    return cluster


def _unit(rows: Tensor) -> Tensor:
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(_TINY)


def _first_largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Largest of the last dimension and where it first stands."""
    most = values.amax(dim=-1, keepdim=True)
    at = torch.arange(values.shape[-1], device=values.device)
    return most.squeeze(-1), torch.where(values == most, at, values.shape[-1]).amin(dim=-1)


def _seeds(unit: Tensor, importance: Tensor, count: int) -> Tensor:
    """`[M, c, D]`: the tokens that the clusters begin with."""
    _, place = _first_largest(importance)
    nearest = torch.full(importance.shape, -torch.inf, device=unit.device)  # largest cosine with a seed
    places = [place]
    for _ in range(count - 1):
        seed = unit[torch.arange(len(unit), device=unit.device), places[-1]]
        nearest = nearest.maximum(torch.stack([(rows @ of[:, None])[:, 0] for rows, of in zip(unit, seed)]))
        nearest = nearest.scatter(1, places[-1][:, None], torch.inf)
        places.append(_first_largest(-nearest)[1])
    index = torch.stack(places, dim=1)[..., None].expand(-1, -1, unit.shape[2])
    return unit.gather(1, index)


def _filled(cluster: Tensor, fit: Tensor, count: int) -> Tensor:
    """`cluster` `[M, R]` with a member in each of `count`: those without take tokens whose `fit` `[M, R]` is worst."""
    images, tokens = cluster.shape
    at = torch.arange(tokens, device=cluster.device).expand_as(cluster)
    best = torch.full((images, count), -torch.inf, device=fit.device).scatter_reduce(1, cluster, fit, "amax")
    stands = torch.where(fit == best.gather(1, cluster), at, tokens)
    first = torch.full((images, count), tokens, device=at.device).scatter_reduce(1, cluster, stands, "amin")
    is_best = first.gather(1, cluster) == at
    order = torch.where(is_best, torch.inf, fit).argsort(dim=1, stable=True)  # worst first
    empty = first == tokens
    rank = empty.cumsum(dim=1) - 1  # of an empty cluster among them
    taken = order.gather(1, rank.clamp(0, tokens - 1))
    spare = torch.cat([cluster, cluster[:, :1]], dim=1)  # a last column for clusters that need none
    number = torch.arange(count, device=cluster.device).expand(images, -1)
    return spare.scatter(1, torch.where(empty, taken, tokens), number)[:, :tokens]


@register_method("vmtc")
@dataclass
class VMTC(Pruner):
    """Three quarters of the k tokens `[N, D]` by [CLS] attention, one quarter means of clusters of the others.

    Attributes:
        placement: where merged tokens stand: "slot" or "append", see above.
    """

    merges: ClassVar[bool] = True
    published: ClassVar[str] = "arXiv 2411.15453, no code (reconstruction)"

    placement: str = "slot"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {self.placement!r}.")
        if self.placement == "append" and self.positions == "keep":
            raise ValueError(
                "placement='append' puts merged tokens behind the kept ones, so no token keeps its position id, and "
                "positions is 'keep' (the only policy on models with 3-D positions). Use placement='slot'."
            )

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        return (summary_attention(tower, tower.feature_layer),)

    def notes(self, tower: TowerInfo) -> tuple[str, ...]:
        notes = ["reconstruction: the paper's body was not read, and there is no code"]
        if not tower.has_cls:
            notes.append("received attention stands in for [CLS] attention")
        return tuple(notes)

    def score(self, view: View) -> Tensor:
        """a, `[M, N]` fp32."""
        signal = self.signals(view.tower)[0]
        return view.signal(signal.name, signal.layer, *signal.settings)

    def select(self, view: View) -> Selection:
        score = self.score(view)
        refuse_nan(score)
        refuse_nan(view.features)
        count, clusters = kept_and_clusters(view.budget)
        kept = topk_indices(score, count)
        if not clusters:
            return Selection(kept, sizes=torch.ones_like(kept, dtype=torch.float32))
        images, num_tokens = score.shape
        at = torch.arange(num_tokens, device=score.device).expand(images, -1)
        stays = torch.zeros_like(score, dtype=torch.bool).scatter(1, kept, True)
        rest = stays.to(torch.int8).argsort(dim=1, stable=True)[:, : num_tokens - count]  # [M, R], in raster order
        loose = view.features.gather(1, rest[..., None].expand(-1, -1, view.features.shape[2]))
        weight = score.gather(1, rest)
        cluster = clusters_of(_unit(loose.float()), weight, clusters)
        slots = _slots(rest, weight, cluster, clusters, num_tokens)  # [M, c]
        members = torch.zeros(slots.shape, device=score.device).scatter_add(1, cluster, torch.ones_like(weight))
        mass = torch.zeros_like(members).scatter_add(1, cluster, weight)
        even = mass.gather(1, cluster) < _NOTHING
        merged = merge(loose, cluster, clusters, torch.where(even, 1.0, weight))
        # clusters in the order of their slots, so that what is merged can be laid out by one sort
        slots, order = slots.sort(dim=1)
        merged = merged.gather(1, order[..., None].expand_as(merged))
        own = view.features.gather(1, kept[..., None].expand(-1, -1, merged.shape[2]))
        places, turn = torch.cat([kept, slots], dim=1).sort(dim=1)
        if self.placement == "append":
            turn = at[:, : places.shape[1]]
        features = torch.cat([own, merged], dim=1).gather(1, turn[..., None].expand(-1, -1, merged.shape[2]))
        sizes = torch.cat([torch.ones_like(kept, dtype=torch.float32), members.gather(1, order)], dim=1)
        return Selection(places, features, sizes=sizes.gather(1, turn))

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        kept, clusters = kept_and_clusters(keep)
        products = (max(clusters - 1, 0) + _ROUNDS * clusters) * (num_tokens - kept)
        return 2 * num_images * products * width


def _slots(rest: Tensor, weight: Tensor, cluster: Tensor, count: int, num_tokens: int) -> Tensor:
    """`[M, c]` int64: where the member with the largest weight of each cluster stands."""
    images = len(rest)
    most = torch.full((images, count), -torch.inf, device=weight.device).scatter_reduce(1, cluster, weight, "amax")
    stands = torch.where(weight == most.gather(1, cluster), rest, num_tokens)
    return torch.full((images, count), num_tokens, device=rest.device).scatter_reduce(1, cluster, stands, "amin")
