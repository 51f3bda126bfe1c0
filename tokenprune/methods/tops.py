"""Keeps tokens by relevance, coverage and distance together, at the input and twice in the decoder (TOPS).

Paper: "TOPS: First-Principles Visual Token Pruning via Constructing Token Optimal Preservation Sets", Wang et al.,
https://arxiv.org/abs/2606.27161 v1 (25 Jun 2026; full text read in a public conversion). No code was found.

The first token is the most relevant one; then, again and again, the one with the highest relevance + alpha distance +
lambda coverage, each term divided by its mean over the tokens that are left (appendix; the main text says min-max, see
`scale`). Distance is 1 - the largest cosine to a kept token, coverage what the token adds to the coverage of those not
kept. Relevance at the input is [CLS]'s attention in the feature layer, in the decoder the attention of the text.

    next = argmax_i (rel_i / mean rel + alpha d_i / mean d + lambda c_i / mean c)
    d_i = 1 - max_{j in S} cos(x_i, x_j)

With keep = T there are 2 T at the input, T from layer 12 and T / 4 from layer 24 of 32 (paper); other depths in
proportion. Decoders of 28 layers (Qwen2.5-VL-7B) cut at 12 and 16, as published, to 281/256 T and 77/256 T. The mean
over the layers is 1.19 T of 32 layers and 1.14 T of 28, so published rows are not at the cost of one cut to T: write
keep="avg64" for a mean of 64.

Our choices, and deviations:
- Terms are scaled over the tokens that are left, anew in each step. A cosine is meant by "similarity".
- The text whose attention counts is all text behind the last visual token, mean over heads; the paper thresholds it by
  a rule that is not given, and finds all text, chosen text and the last token within 0.3 points of each other.
- Weights are 0.5 at all stages: those of the paper differ by model and budget and were tuned on its benchmarks.
- Without [CLS] the attention that patches receive stands in; the paper expects it to do worse and names none.
- Ties go to the lower raster index. At the input each crop is ranked alone, in the decoder a visual together.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths, Pruner, Stage
from tokenprune.interfaces.selection import Selection, refuse_nan
from tokenprune.interfaces.signals import INSTRUCTION_ATTENTION, Signal, TowerInfo, summary_attention
from tokenprune.interfaces.view import View
from tokenprune.methods._preservation import greedy_preservation
from tokenprune.registry import near, register_method

SCALES = ("mean", "extremes")
SCHEDULE = (2.0, 1.0, 0.25)
SCHEDULE_OF_28 = (2.0, 281 / 256, 77 / 256)


class TimesBudget(Budget):
    """So many times the budget, rounded down, at least one and at most all; all where all are asked for."""

    def __init__(self, keep: int | float, times: float) -> None:
        super().__init__(keep)
        self._times = times

    def tokens(self, num_tokens: int) -> int:
        wanted = self.keep if isinstance(self.keep, int) else self.keep * num_tokens
        if wanted >= num_tokens:
            return num_tokens
        return min(num_tokens, max(1, math.floor(wanted * self._times + 1e-9)))


def stage_layers(depths: ModelDepths) -> tuple[int, ...]:
    """Where the two cuts in the decoder stand, as far as it has the layers."""
    if depths.decoder == 28:
        layers = (12, 16)
    else:
        layers = (math.floor(depths.decoder * 12 / 32 + 0.5), math.floor(depths.decoder * 24 / 32 + 0.5))
    first = max(layers[0], depths.first_cut)
    return tuple(layer for layer in (first, max(layers[1], first + 1)) if layer < depths.decoder)


@register_method("tops")
@dataclass
class Tops(Pruner):
    """Picks k of N tokens `[M, N, D]` by three criteria, at up to three places.

    Attributes:
        diversity: alpha, weight of the distance, from 0 on.
        coverage: lambda, weight of the coverage, from 0 on.
        scale: "mean" (appendix) or "extremes" (main text), how terms are brought to one scale.
        stages_in_decoder: False leaves it at the cut at the input, to `keep` tokens (the paper's ablation).
    """

    text_aware: ClassVar[bool] = True
    published: ClassVar[str] = "arXiv 2606.27161, no official code found"
    reproduces: ClassVar[str] = (
        "LLaVA-1.5-7B at keep=64 (mean 76 a layer): 97.1 % of the unpruned average of 8 benchmarks (arXiv 2606.27161)"
    )
    plan_options: ClassVar[tuple[str, ...]] = ("stages_in_decoder",)

    diversity: float = 0.5
    coverage: float = 0.5
    scale: str = "mean"
    stages_in_decoder: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("diversity", "coverage"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a weight from 0 on, got {getattr(self, name)!r}.")
        if self.scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {self.scale!r}.{near(self.scale, SCALES)}")

    def stages(self, budget: Budget, depths: ModelDepths) -> tuple[Stage, ...]:
        if not self.stages_in_decoder:
            return (Stage("input", self, budget),)
        times = SCHEDULE_OF_28 if depths.decoder == 28 else SCHEDULE
        later = dataclasses.replace(self, scope="visual")
        places = [("input", self), *((f"layer:{layer}", later) for layer in stage_layers(depths))]
        return tuple(Stage(site, one, TimesBudget(budget.keep, more)) for (site, one), more in zip(places, times))

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        if place == "layer":
            return (Signal(INSTRUCTION_ATTENTION, depth - 1 if depth else 0),)
        return (summary_attention(tower, tower.feature_layer),)

    def notes(self, tower: TowerInfo) -> tuple[str, ...]:
        if tower.has_cls:
            return ()
        return ("extension: no [CLS] in this tower, the attention that patches receive stands in",)

    def order(self, view: View) -> Tensor:
        """`[M, k]` int64, the kept tokens in the order of choice: the first j are the choice for a budget of j."""
        (signal,) = self.signals_at(view.tower, view.site.partition(":")[0], view.depth)
        relevance = view.signal(signal.name, signal.layer, *signal.settings)
        refuse_nan(relevance)
        refuse_nan(view.features)
        by_mean = self.scale == "mean"
        return greedy_preservation(view.features, relevance, view.budget, self.diversity, self.coverage, by_mean)

    def select(self, view: View) -> Selection:
        return Selection(self.order(view).sort(dim=1).values)

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        return 2 * num_images * num_tokens**2 * width
