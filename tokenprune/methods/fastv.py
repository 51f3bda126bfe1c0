"""Keeps what the prompt's last token attends to in an early decoder layer (FastV).

Paper: "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language
Models", Chen et al., ECCV 2024, https://arxiv.org/abs/2403.06764.
Official code: pkunlp-icler/FastV (its in-place form).
Licence: upstream names none that was checked here; this file was written from the formulas, no code was copied.

Entering decoder layer K, visual tokens are ranked by the attention that the last prompt token paid them in layer K - 1,
softmax over all tokens, mean over heads (code; the paper speaks of the average attention received, which the authors'
threads settle as the last row). The kept ones keep their position ids (code).

    s_j = (1 / H) sum_h A_{K-1,h}[last, j]

Deviations:
- Each image or video has its own budget; the official code ranks one hard-coded span of one image.
- The row is computed from layer K - 1's own projections of its input, so that the model keeps its fast attention; the
  official code forces eager attention to read it.
- Pruned once, at prefill; the official masking form, which ranks anew at each decoded token, is not here.
- `keep` counts the tokens after the cut. With K = 2, L = 32 and N = 576 the published averages 192 / 128 / 64 are
  `average=192` and so on, or keep = 166 / 98 / 30.
- Ties go to the lower raster index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths, Pruner, Stage
from tokenprune.interfaces.search_space import Range
from tokenprune.interfaces.signals import LAST_ATTENTION, Signal, TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.registry import register_method


@register_method("fastv")
@dataclass
class FastV(Pruner):
    """Ranks the visual tokens `[M, N]` by one attention row of the decoder.

    Attributes:
        layer: K, the decoder layer before which tokens leave, 0-based; 2 is the paper's. Families that add visual
            features inside the decoder cannot be cut so early: there the lowest possible K is taken.
    """

    site: ClassVar[str] = "layer"
    default_scope: ClassVar[str] = "visual"
    published_positions: ClassVar[str] = "keep"
    published: ClassVar[str] = "arXiv 2403.06764, pkunlp-icler/FastV"
    reproduces: ClassVar[str] = (
        "LLaVA-1.5-7B, K = 3, half of the tokens: GQA 60.4 of 62.0, MME-P 1511.7 of 1510.8 (official README)"
    )
    text_aware: ClassVar[bool] = True
    plan_options: ClassVar[tuple[str, ...]] = ("layer",)

    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise ValueError(f"layer must be a decoder layer from 1 on, got {self.layer!r}.")

    @classmethod
    def search_space(cls, mean: float, depths: ModelDepths) -> Mapping[str, Range]:
        return {"layer": Range(depths.first_cut, depths.decoder - 1, max(2, depths.first_cut))}

    def stages(self, budget: Budget, depths: ModelDepths) -> tuple[Stage, ...]:
        return (Stage(f"layer:{max(self.layer, depths.first_cut)}", self, budget),)

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        if place != "layer":
            raise ValueError(f"fastv ranks by attention inside the decoder, so it acts at 'layer:K', not at {place!r}.")
        return (Signal(LAST_ATTENTION, depth - 1),)

    def score(self, view: View) -> Tensor:
        return view.signal(LAST_ATTENTION, view.depth - 1)
