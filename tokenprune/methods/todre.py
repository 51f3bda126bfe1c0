"""Keeps mutually dissimilar tokens, grown greedily from the one that [CLS] attends to most (ToDRE, stage 1).

Paper: "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance", Li et al., v2 of Nov 2025,
https://arxiv.org/abs/2505.18757. v1 had another title, "ToDRE: Visual Token Pruning via Diversity and Task Awareness
for Efficient Large Vision-Language Models".
Official code: none found; everything follows the text of v2, with which no code could be compared.
Licence: unknown, there is no code; this file was written from the formulas.

Stage 1 only: diversity before the LLM. The paper's stage 2, which drops all visual tokens at decoder layer 7L/8 once
cross-modal attention has faded, is not part of this method; the paper's ablation credits stage 1 with nearly all of
the time saved (31:18 of 77:04 minutes left with stage 1 alone, 29:43 with both).

The pivot is the token with the most [CLS] attention in the last encoder layer (paper). Embeddings are normalised, and
then, k - 1 times, the token with the smallest summed cosine similarity to the chosen ones joins them (paper, v2). The
abstract of v1 speaks of "greedy k-center", which minimises the largest similarity instead; that its formula differed is
unverified, and `objective="k_center"` is our reading of the name.

Our choices, where the paper is silent:
- [CLS] attention per head with softmax over [CLS] and patches, then the mean over heads (the paper writes one head).
- Towers without [CLS]: the paper allows a random pivot; the default here is the token nearest the mean of the
  normalised embeddings, by cosine, which the paper's ablation ("center") finds nearly equal and needs no seed.
- The kept tokens are sorted into raster order; ties go to the lower raster index.
- Images are selected one by one. The paper selects jointly over the thumbnail and all crops of LLaVA-NeXT and over all
  frames of a video, with the pivot from the thumbnail or from the best frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.base import Pruner, View
from tokenprune.kernels.greedy_diversity import OBJECTIVES, greedy_diversity, greedy_diversity_flops
from tokenprune.methods.random import hash_tokens
from tokenprune.registry import register_method
from tokenprune.selection import Selection, topk_indices
from tokenprune.signals import CLS_ATTENTION, Signal, Tower

PIVOTS = ("cls", "center", "random")


@register_method("todre")
@dataclass
class ToDRE(Pruner):
    """Picks k of the N `[N, D]` embeddings, starting from a pivot, each the least similar to those before it.

    Attributes:
        objective: "max_sum" (paper v2) minimises the sum of cosine similarities to the chosen tokens, "k_center" the
            largest of them.
        pivot: the first token. "cls": most [CLS] attention in the last vision block; on a tower without [CLS] the same
            as "center". "center": nearest the mean embedding. "random": seeded, by image.
        seed: of the random pivot, any integer.
    """

    published: ClassVar[str] = "arXiv 2505.18757, no official code"

    objective: str = "max_sum"
    pivot: str = "cls"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}.")
        if self.pivot not in PIVOTS:
            raise ValueError(f"pivot must be one of {', '.join(PIVOTS)}, got {self.pivot!r}.")

    def signals(self, tower: Tower) -> tuple[Signal, ...]:
        if self.pivot == "cls" and tower.has_cls:
            return (Signal(CLS_ATTENTION, tower.num_layers - 1),)
        return ()

    def first(self, view: View) -> Tensor:
        """The pivot of each image, `[M]` int64."""
        if self.pivot == "random":
            scores = hash_tokens(view.keys(), view.num_tokens, self.seed)
        elif self.pivot == "cls" and view.tower.has_cls:
            scores = view.signal(CLS_ATTENTION, view.tower.num_layers - 1)
        else:
            unit = normalize(view.features.float(), dim=2)
            scores = (unit @ unit.mean(dim=1).unsqueeze(2)).squeeze(2)
        return topk_indices(scores, 1).squeeze(1)

    def select(self, view: View) -> Selection:
        chosen = greedy_diversity(view.features, view.budget, self.objective, self.first(view))
        return Selection(chosen.sort(dim=1).values)

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: Tower) -> int:
        center = self.pivot == "center" or (self.pivot == "cls" and not tower.has_cls)
        nearest_mean = 2 * num_images * num_tokens * width if center else 0
        return nearest_mean + greedy_diversity_flops(num_images, num_tokens, width, keep, has_first=True)
