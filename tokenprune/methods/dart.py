"""Keeps a few pivots and the tokens that are least like them (DART).

Paper: "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", Wen et al., EMNLP
2025, https://arxiv.org/abs/2502.11494.
Official code: ZichenWen1/DART, read in the copy that Chenfei-Liao/VTC-Bench holds at 983e443; upstream's head may
differ (unverified).
Licence: Apache-2.0 upstream; this file was written from the formulas, no code was copied.

Entering decoder layer K = 2, pivots are the 4 visual and the 4 text tokens with the largest L1 norm of the key in layer
K - 1, after rotation and over all heads; text is what stands behind the visual tokens (code). Each pivot in turn takes,
of the visual tokens that are neither pivots nor taken, those with the lowest cosine to it, between hidden states that
enter layer K, as the norm behind the model's last layer makes them (code). Visual pivots and what was taken stay, text
pivots are not counted. Position ids are kept (code). No attention is read.

    s_j = |k_j|_1,  pivots: the 4 visual and the 4 text tokens with the largest s
    pivot p takes the tokens with the lowest cos(h_p, h_j)

`variant` says how many each pivot takes. "exact" (our choice): the budget without the visual pivots, shared evenly, and
what is left over one each to the first pivots, so that exactly the budget stays. "official": an eighth of the budget,
rounded down, so that 4 + 8 (keep // 8) stay: 132 for 128. `keep` is the official `max_num_trunction`, a fraction its
ratio.

Deviations, and our choices:
- The official loop goes over a Python set of places, so pivots take in an order that means nothing. Here visual pivots
  come first, then those of the text, each kind by falling norm, and of equal norms the earlier token.
- Each image or video has its own budget and pivots; the text is that behind the prompt's last visual token. Where it
  has fewer tokens than pivots, they come again in turn, and where there is none, the prompt's last token stands in; the
  official code has one image and fails.
- Keys that heads share are counted once; the official code repeats them, which changes no rank.
- "official" for a budget above N - 4 takes an eighth of N - 4, as the code does for LLaVA-NeXT.
- Cosines are fp32, of states normed in the model's dtype. Ties go to the lower raster index.
- `keep` counts the tokens after the cut; `average=128` solves for the mean over the layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths, Pruner, Stage
from tokenprune.interfaces.search_space import Range
from tokenprune.interfaces.selection import Selection, refuse_nan, topk_indices
from tokenprune.interfaces.signals import DECODER_KEY_NORM, FINAL_STATES, TEXT_PIVOT_COSINE, Signal, TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.registry import near, register_method

VARIANTS = ("exact", "official")


class QuotaBudget(Budget):
    """The visual pivots and an equal quota for each pivot: p + (p + t) floor(k / (p + t)), k at most N - p."""

    def __init__(self, keep: int | float, image_pivots: int, text_pivots: int) -> None:
        super().__init__(keep)
        self._image, self._all = image_pivots, image_pivots + text_pivots

    def tokens(self, num_tokens: int) -> int:
        # a hair above, so that a fraction that is a whole number is not rounded below itself
        wanted = self.keep if isinstance(self.keep, int) else math.floor(self.keep * num_tokens + 1e-9)
        pivots = min(self._image, num_tokens)
        return pivots + min(wanted, num_tokens - pivots) // self._all * self._all


@register_method("dart")
@dataclass
class DART(Pruner):
    """Picks k of the N tokens `[N, D]` by their unlikeness to a few pivots.

    Attributes:
        layer: K, the decoder layer before which tokens leave, 0-based; 2 is the official scripts'. Families that add
            visual features inside the decoder cannot be cut so early: there the lowest possible K is taken.
        image_pivots: pivots among the visual tokens, from 1 on.
        text_pivots: pivots among the text, from 0 on.
        variant: "exact" or "official", see the module.
    """

    site: ClassVar[str] = "layer"
    default_scope: ClassVar[str] = "visual"
    published_positions: ClassVar[str] = "keep"
    text_aware: ClassVar[bool] = True
    published: ClassVar[str] = "arXiv 2502.11494, ZichenWen1/DART"
    reproduces: ClassVar[str] = (
        "LLaVA-1.5-7B, GQA: 60.0 / 58.7 / 55.9 at 192 / 128 / 64 tokens, as SIEVE's table prints them (family A)"
    )
    plan_options: ClassVar[tuple[str, ...]] = ("layer",)

    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4
    variant: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("layer", 1), ("image_pivots", 1), ("text_pivots", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number from {least} on, got {value!r}.")
        if self.variant not in VARIANTS:
            raise ValueError(
                f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}."
                f"{near(self.variant, list(VARIANTS))}"
            )

    @classmethod
    def search_space(cls, mean: float, depths: ModelDepths) -> Mapping[str, Range]:
        return {"layer": Range(depths.first_cut, depths.decoder - 1, max(2, depths.first_cut))}

    def stages(self, budget: Budget, depths: ModelDepths) -> tuple[Stage, ...]:
        return (self.stage_at(f"layer:{max(self.layer, depths.first_cut)}", budget),)

    def stage_at(self, site: str, budget: Budget) -> Stage:
        if self.variant == "official":
            budget = QuotaBudget(budget.keep, self.image_pivots, self.text_pivots)
        return Stage(site, self, budget)

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        if place != "layer":
            raise ValueError(f"dart ranks by keys inside the decoder, so it acts at 'layer:K', not at {place!r}.")
        found = (Signal(DECODER_KEY_NORM, depth - 1), Signal(FINAL_STATES, depth))
        return (*found, Signal(TEXT_PIVOT_COSINE, depth, (self.text_pivots,))) if self.text_pivots else found

    def quotas(self, budget: int) -> list[int]:
        """How many tokens each pivot takes, those of the visual tokens first."""
        pivots = min(self.image_pivots, budget)
        count = pivots + self.text_pivots
        share, over = divmod(budget - pivots, count)
        return [share + (turn < over) for turn in range(count)]

    def select(self, view: View) -> Selection:
        for values in view.signals.values():
            refuse_nan(values)
        norms = view.signal(DECODER_KEY_NORM, view.depth - 1)  # [M, N]
        order = norms.argsort(dim=1, descending=True, stable=True)
        pivots = order[:, : min(self.image_pivots, view.budget)]  # [M, p]
        unit = normalize(view.signal(FINAL_STATES, view.depth), dim=-1)  # [M, N, D]
        likeness = [(unit * self._row(unit, at)).sum(dim=-1) for at in pivots.unbind(1)]
        if self.text_pivots:
            likeness += view.signal(TEXT_PIVOT_COSINE, view.depth, self.text_pivots).unbind(-1)
        kept = torch.zeros_like(norms, dtype=torch.bool).scatter(1, pivots, True)
        for cosine, quota in zip(likeness, self.quotas(view.budget)):
            if quota:
                taken = topk_indices((-cosine).masked_fill(kept, -torch.inf), quota)
                kept = kept.scatter(1, taken, True)
        return Selection(topk_indices(kept.to(torch.float32), view.budget))

    @staticmethod
    def _row(unit: Tensor, at: Tensor) -> Tensor:
        """Of `[M, N, D]` the token `at` `[M]` of each image, `[M, 1, D]`."""
        return unit.gather(1, at[:, None, None].expand(-1, 1, unit.shape[-1]))
