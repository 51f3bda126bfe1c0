"""Keeps mutually dissimilar tokens, and drops them all once the text has stopped looking at them (ToDRE).

Paper: "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance", Li et al., v2 of Nov 2025,
https://arxiv.org/abs/2505.18757. v1 had another title, "ToDRE: Visual Token Pruning via Diversity and Task Awareness
for Efficient Large Vision-Language Models".
Official code: none found; everything follows the text of v2, with which no code could be compared.
Licence: unknown, there is no code; this file was written from the formulas.
Published: LLaVA-NeXT-7B, of 2880 tokens 720 / 288: GQA 63.3 / 59.4 of 64.2, POPE 87.5 / 85.0 of 87.7, MME 1504.3 /
1464.4 of 1519.6, average over eight benchmarks 98.2 / 95.0 percent (paper; its ablation has other numbers for 288).

Stage 1, before the decoder, is diversity. The pivot is the token with the most [CLS] attention in the last encoder
layer (paper). Embeddings are normalised, and then, k - 1 times, the token with the smallest summed cosine similarity to
the chosen ones joins them (paper, v2). The abstract of v1 speaks of "greedy k-center", which minimises the largest
similarity instead; that its formula differed is unverified, and `objective="k_center"` is our reading of the name.

    s_{t+1} = argmin_i sum_{j in S_t} cos(x_i, x_j)

Stage 2 (`fade`), at one deep layer: with the layer's attention, mean over heads, it takes the share of the text rows'
attention that goes to visual tokens, and the share of the visual rows' attention that goes to text. Where both are
below tau = 0.1, all visual tokens of the prompt leave; the decision is each prompt's own, at prefill (paper).

Our choices, where the paper is silent:
- [CLS] attention per head with softmax over [CLS] and patches, then the mean over heads (the paper writes one head).
- Towers without [CLS]: the paper allows a random pivot; the default here is the token nearest the mean of the
  normalised embeddings, by cosine, which the paper's ablation ("center") finds nearly equal and needs no seed.
- The kept tokens are sorted into raster order; ties go to the lower raster index (copies of a token need not tie: their
  similarities may be rounded otherwise).
- Stage 2 measures in layer number floor(7 L / 8), counted from 1, and visual tokens leave its output: the cut is
  "layer:K" with K = floor(7 L / 8) counted from 0. Text is what follows the first visual token of the prompt: what
  stands before it is taken for the system prompt, which the paper leaves out. All text that follows all visual tokens
  makes the second share zero under a causal mask, so that the first one decides alone.
- A prompt without text behind its pictures is judged by its last token, whatever that is.
- A budget in percent is rounded to the nearest token, as for every method here.
- Positions at stage 2 stay as they are. With keep=1.0 there is no stage 2, as nothing may leave.

Several crops and the frames of a video are selected jointly, with the pivot from the thumbnail where there is one
(paper); separators leave with the first cut (our choice).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths, Pruner, Stage
from tokenprune.interfaces.selection import Selection, topk_indices
from tokenprune.interfaces.signals import CLS_ATTENTION, TEXT_TO_VISUAL, VISUAL_TO_TEXT, Signal, TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.kernels.greedy_diversity import OBJECTIVES, greedy_diversity, greedy_diversity_flops
from tokenprune.methods._places import hash_tokens
from tokenprune.registry import register_method

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
        fade: whether stage 2 follows.
        tau: threshold of both shares at stage 2, at least 0 (never) and 0.1 in the paper.
        depth: where stage 2 cuts, as a part of the decoder's depth; 7/8 in the paper.
    """

    published: ClassVar[str] = "arXiv 2505.18757, no official code"
    text_aware: ClassVar[bool] = False  # stage 2 asks the text whether all leave, never which
    plan_options: ClassVar[tuple[str, ...]] = ("tau", "depth")
    default_scope: ClassVar[str] = "visual"

    objective: str = "max_sum"
    pivot: str = "cls"
    seed: int = 0
    fade: bool = True
    tau: float = 0.1
    depth: float = 7 / 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}.")
        if not self.tau >= 0:
            raise ValueError(f"tau must be a share from 0 on, got {self.tau!r}.")
        if not 0 < self.depth < 1:
            raise ValueError(f"depth must be a part of the decoder's depth between 0 and 1, got {self.depth!r}.")
        if self.pivot not in PIVOTS:
            raise ValueError(f"pivot must be one of {', '.join(PIVOTS)}, got {self.pivot!r}.")

    @property
    def is_random(self) -> bool:
        return self.pivot == "random"

    def stages(self, budget: Budget, depths: ModelDepths) -> tuple[Stage, ...]:
        first = Stage("input", self, budget)
        layer = int(self.depth * depths.decoder)
        if not self.fade or layer < depths.first_cut or (isinstance(budget.keep, float) and budget.keep == 1.0):
            return (first,)
        return (first, Stage(f"layer:{layer}", DropAllStage(tau=self.tau), Budget(1.0)))

    def notes(self, tower: TowerInfo) -> tuple[str, ...]:
        if self.pivot == "cls" and not tower.has_cls:
            return ("our choice: no [CLS] in this tower, the pivot is the token nearest the mean",)
        return ()

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        if self.pivot == "cls" and tower.has_cls:
            return (Signal(CLS_ATTENTION, tower.num_layers - 1),)
        return ()

    def first(self, view: View) -> Tensor:
        """The pivot of each image, `[M]` int64."""
        if self.pivot == "random":
            scores = hash_tokens(view.keys(), view.num_tokens, self.seed)
        elif self.pivot == "cls" and view.tower.has_cls:
            scores = view.signal(CLS_ATTENTION, view.tower.num_layers - 1)
            if view.rasters[0].kind == "thumbnail":
                scores = self._in_thumbnail(view, scores)
        else:
            unit = normalize(view.features.float(), dim=2)  # [M, N, D]
            scores = (unit @ unit.mean(dim=1).unsqueeze(2)).squeeze(2)  # [M, N, D] @ [M, D, 1] -> [M, N]
        return topk_indices(scores, 1).squeeze(1)

    @staticmethod
    def _in_thumbnail(view: View, scores: Tensor) -> Tensor:
        count = view.rasters[0].num_tokens
        if view.tokens is None:
            return scores[:, :count]
        inside = view.tokens.to(scores.device) < count
        # where an earlier cut left none of the thumbnail, all tokens compete
        return scores.masked_fill(~inside & inside.any(dim=1, keepdim=True), -torch.inf)

    def select(self, view: View) -> Selection:
        chosen = greedy_diversity(view.features, view.budget, self.objective, self.first(view))
        return Selection(chosen.sort(dim=1).values)

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        center = self.pivot == "center" or (self.pivot == "cls" and not tower.has_cls)
        nearest_mean = 2 * num_images * num_tokens * width if center else 0
        return nearest_mean + greedy_diversity_flops(num_images, num_tokens, width, keep, has_first=True)


@dataclass
class DropAllStage(Pruner):
    """Stage 2: keeps all N visual tokens of a prompt, or none.

    Attributes:
        tau: both shares of attention must be below it for the tokens to leave.
    """

    name: ClassVar[str] = "todre_fade"
    default_scope: ClassVar[str] = "visual"
    adaptive: ClassVar[bool] = True
    published_positions: ClassVar[str] = "keep"

    positions: str | None = "keep"
    tau: float = 0.1

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        return (Signal(TEXT_TO_VISUAL, depth - 1), Signal(VISUAL_TO_TEXT, depth - 1))

    def select(self, view: View) -> Selection:
        layer = view.depth - 1
        fades = (view.signal(TEXT_TO_VISUAL, layer) < self.tau) & (view.signal(VISUAL_TO_TEXT, layer) < self.tau)
        everything = torch.arange(view.num_tokens, device=view.features.device).expand(view.num_images, -1)
        return Selection(everything, counts=[0 if gone else view.num_tokens for gone in fades.tolist()])
