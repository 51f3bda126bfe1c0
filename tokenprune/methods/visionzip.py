"""Keeps the patches that [CLS] attends to most, and merges the rest into a few tokens by their keys (VisionZip).

Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", Yang et al., CVPR 2025,
https://arxiv.org/abs/2412.04467.
Official code: dvlab-research/VisionZip at 3151f6d.
Licence: Apache-2.0 upstream; this file was written from the formulas, no code was copied.

Dominant tokens are those with the highest [CLS] attention in the feature layer, summed over heads. Of the n others, in
raster order, every floor(n / c)-th is a target, c of them; each other one goes to the target whose key is most similar
(cosine of keys of that layer, averaged over heads). A contextual token is its target plus the mean of what goes to it
(code: a sum of two, about twice as long; `merge="mean"` takes the mean of all).

    dominant: the largest sum_h A_h[CLS, j]
    x_t' = x_t + mean x_j  over the tokens j whose keys are most like that of target t

Deviations:
- The official count of dominant tokens includes [CLS], which is no token here: all of k are patches (our choice). The
  share of contextual ones is the official 10 of 64, also in its 20 of 128 and 30 of 192.
- Merging is of the tokens as the decoder gets them, behind the projector; the official code merges before it.
- Contextual tokens stand at the places of their targets, in raster order; the official code puts them at the end.
- A target that nothing goes to stays as it is. Ties go to the lower raster index.
- Without [CLS] the attention that patches receive stands in, as the authors' Qwen2.5-VL port does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, refuse_nan, topk_indices
from tokenprune.interfaces.signals import TOWER_KEYS, Signal, TowerInfo, summary_attention
from tokenprune.interfaces.view import View
from tokenprune.kernels.merge import merge
from tokenprune.registry import near, register_method

MERGES = ("official", "mean")


@register_method("visionzip")
@dataclass
class VisionZip(Pruner):
    """Ranks `[M, N]` by attention and merges the rest by keys `[M, N, H d]`.

    Attributes:
        contextual: the share of the kept tokens that are merged ones, in [0, 1); 10 of 64 in the code. At least one
            of each kind where the budget has room for both.
        merge: "official" or "mean", see above.
    """

    merges: ClassVar[bool] = True
    published: ClassVar[str] = "arXiv 2412.04467, dvlab-research/VisionZip"
    reproduces: ClassVar[str] = (
        "LLaVA-1.5-7B at 64 of 576: GQA 55.1, POPE 77.0, TextVQA 55.5 (as copied in the SIEVE paper); 56.0, 78.2, 53.8 "
        "re-run in one environment (arXiv 2606.01711, Table 1)"
    )

    contextual: float = 10 / 64
    merge: str = "official"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.contextual, bool) or not 0 <= self.contextual < 1:
            raise ValueError(f"contextual must be a share of the kept tokens in [0, 1), got {self.contextual!r}.")
        if self.merge not in MERGES:
            raise ValueError(f"merge must be one of {', '.join(MERGES)}, got {self.merge!r}.{near(self.merge, MERGES)}")

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        layer = tower.feature_layer
        return (summary_attention(tower, layer), Signal(TOWER_KEYS, layer))

    def notes(self, tower: TowerInfo) -> tuple[str, ...]:
        notes = ("all dominant tokens are patches, [CLS] is none of them; merged behind the projector",)
        if tower.has_cls:
            return notes
        return (*notes, "no [CLS] in this tower, the attention that patches receive stands in")

    def merged_count(self, budget: int) -> int:
        """c, how many of the kept tokens are merged ones."""
        if not self.contextual or budget < 2:
            return 0
        return min(max(1, round(budget * self.contextual)), budget - 1)

    def select(self, view: View) -> Selection:
        attention, keys = (view.signal(s.name, s.layer, *s.settings) for s in self.signals(view.tower))
        refuse_nan(keys)
        count = self.merged_count(view.budget)
        dominant = topk_indices(attention, view.budget - count)
        if not count:
            return Selection(dominant)
        images, tokens, _ = view.features.shape
        is_dominant = torch.zeros(images, tokens, dtype=torch.int8, device=dominant.device).scatter_(1, dominant, 1)
        rest = is_dominant.sort(dim=1, stable=True).indices[:, : tokens - dominant.shape[1]]  # [M, n], raster order
        targets = rest[:, :: max(1, rest.shape[1] // count)][:, :count]  # [M, c]
        metric = normalize(keys.unflatten(2, (view.tower.num_heads, -1)).mean(dim=2), dim=2)  # [M, N, d]
        of_targets = metric.gather(1, targets[..., None].expand(-1, -1, metric.shape[2]))
        goes_to = (metric @ of_targets.transpose(1, 2)).argmax(dim=2)  # [M, N]
        stays = torch.cat([dominant, targets], dim=1)
        goes_to = goes_to.scatter(1, stays, -1)
        merged, sizes = self._merged(view.features, targets, goes_to, count)
        kept = view.features.gather(1, dominant[..., None].expand(-1, -1, view.features.shape[2]))
        order = stays.argsort(dim=1)
        features = torch.cat([kept, merged.to(kept.dtype)], dim=1)
        sizes = torch.cat([torch.ones_like(dominant, dtype=torch.float32), sizes], dim=1)
        return Selection(
            stays.gather(1, order),
            features.gather(1, order[..., None].expand_as(features)),
            sizes=sizes.gather(1, order),
        )

    def _merged(self, features: Tensor, targets: Tensor, goes_to: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Contextual tokens `[M, c, D]` and how many tokens each stands for `[M, c]`.

        Args:
            goes_to: `[M, N]` int64, the number of its target, -1 for tokens that stay.
        """
        own = features.gather(1, targets[..., None].expand(-1, -1, features.shape[2])).float()
        means = merge(features.float(), goes_to, count)  # [M, c, D], zeros where nothing goes
        going = torch.zeros(len(own), count + 1, device=own.device)
        going = going.scatter_add(1, goes_to + 1, torch.ones_like(goes_to, dtype=torch.float32))[:, 1:]
        if self.merge == "official":
            return own + means, going + 1
        return (own + means * going[..., None]) / (going[..., None] + 1), going + 1

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        head = tower.hidden_size // tower.num_heads
        return 2 * num_images * num_tokens * self.merged_count(keep) * head
