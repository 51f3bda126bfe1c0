"""Drops visual tokens step by step, deeper in the decoder (PyramidDrop).

Paper: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", Xing et
al., CVPR 2025, https://arxiv.org/abs/2410.17247.
Official code: Cooperx521/PyramidDrop.
Licence: upstream's was not checked here; this file was written from the formulas, no code was copied.

Before the layers at one, two and three quarters of the depth (8, 16, 24 of 32) the tokens fall to N r, N r^2 and N r^3,
rounded down, with r = 1/2 (code). The score is the attention of the last prompt token, by the projections of the very
layer before which tokens leave, on the hidden states that would enter it, softmax over all tokens in fp32, mean over
heads (code). Positions are closed up at every stage (code).

    N_s = floor(N r^s),  s = 1, 2, 3
    score_j = (1 / H) sum_h A_h[last, j]

Deviations:
- `keep` counts the tokens after the last stage and sets r = (keep / N)^(1 / stages): 72 of 576 is the official
  schedule 288, 144, 72, an average of 270. A fraction is of N at every stage, each count rounded down and at least 1:
  keep = 0.125 is the code's int(N / 2), int(N / 4), int(N / 8) for every N (1170, 585, 292 of 2340). There is no
  variant: how the paper rounds was not checked. The lists behind published rows at 192 / 128 / 64 are not in the
  official repository (unverified), so no setting here claims to be those; an average below N / 4 needs lower layers.
- Each image or video has its own budget; the official code has one image per sample.
- ModelDepths other than 32 take the quarters rounded down (our choice).
- The forms for training (last tokens before each answer) are not here.
- Ties go to the lower raster index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths, Pruner, Stage
from tokenprune.interfaces.signals import LAST_ATTENTION, Signal, TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.registry import register_method


class StepBudget(Budget):
    """What a step of a geometric schedule keeps of N: floor(N f^(step / steps)) for a fraction f, at least 1, and
    floor(N (k / N)^(step / steps)) for a count k, so that the last step keeps k."""

    def __init__(self, keep: int | float, step: int, steps: int) -> None:
        super().__init__(keep)
        self._share = step / steps

    def tokens(self, num_tokens: int) -> int:
        least = super().tokens(num_tokens) if isinstance(self.keep, int) else 1
        ratio = least / num_tokens if isinstance(self.keep, int) else self.keep
        # a hair above, so that exact powers are not rounded below themselves
        return max(least, math.floor(num_tokens * ratio**self._share + 1e-9))


@register_method("pyramiddrop")
@dataclass
class PyramidDrop(Pruner):
    """Ranks the visual tokens `[M, N]` by one attention row of the decoder, at several layers.

    Attributes:
        layers: decoder layers before which tokens leave, 0-based, increasing; None means the quarters of the depth.
    """

    site: ClassVar[str] = "layer"
    default_scope: ClassVar[str] = "visual"
    published: ClassVar[str] = "arXiv 2410.17247, Cooperx521/PyramidDrop"
    reproduces: ClassVar[str] = (
        "LLaVA-1.5-7B, 192 tokens on average over layers: GQA 58.0, POPE 84.0, TextVQA 57.1 (re-run in one "
        "environment: arXiv 2606.01711, Table 1); GQA 57.3, POPE 82.3, TextVQA 56.5 (arXiv 2505.19536)"
    )
    text_aware: ClassVar[bool] = True
    plan_options: ClassVar[tuple[str, ...]] = ("layers",)

    layers: tuple[int, ...] | list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is None:
            return
        layers = list(self.layers)
        if not layers or any(isinstance(k, bool) or not isinstance(k, int) or k < 0 for k in layers):
            raise ValueError(f"layers must be decoder layers like [8, 16, 24], got {self.layers!r}.")
        if layers != sorted(set(layers)):
            raise ValueError(f"layers must increase, got {self.layers!r}.")

    def stages(self, budget: Budget, depths: ModelDepths) -> tuple[Stage, ...]:
        if self.layers is None:
            quarters = (max(depths.decoder * quarter // 4, depths.first_cut) for quarter in (1, 2, 3))
            layers = sorted({layer for layer in quarters if layer < depths.decoder})
        else:
            layers = list(self.layers)
        steps = len(layers)
        return tuple(
            Stage(f"layer:{layer}", self, StepBudget(budget.keep, step, steps)) for step, layer in enumerate(layers, 1)
        )

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        if place != "layer":
            raise ValueError(
                f"pyramiddrop ranks by attention inside the decoder, so it acts at 'layer:K', not at {place!r}."
            )
        return (Signal(LAST_ATTENTION, depth),)

    def score(self, view: View) -> Tensor:
        return view.signal(LAST_ATTENTION, view.depth)
