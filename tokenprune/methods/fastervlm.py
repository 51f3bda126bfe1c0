"""Keeps the patches that [CLS] attends to most in the layer that features come from (FasterVLM).

Paper: "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster", Zhang et
al., https://arxiv.org/abs/2412.01818v1.
Official code: Theia-4869/FasterVLM at f5d5f12.
Licence: Apache-2.0 upstream; this file was written from the formulas, no code was copied.

The score is [CLS]'s attention in the feature layer (LLaVA-1.5: block 22 of 0..23), mean over heads, softmax over [CLS]
and patches (code): the first part of VisionZip, and `vtc_cls` with one layer.

    s_j = (1 / H) sum_h A_h[CLS, j]

Deviations:
- Selection happens after the projector, on tokens that are the same up to float error.
- Ties go to the lower raster index. Crops and frames are ranked each on its own, with their share of the budget.
- Without [CLS] the attention that patches receive stands in (our choice, labelled). Where patches are joined into
  tokens, their mean counts; on InternVL the official rule is reported to lose to random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.signals import Signal, TowerInfo, summary_attention
from tokenprune.interfaces.view import View
from tokenprune.registry import register_method


@register_method("fastervlm")
@dataclass
class FasterVlm(Pruner):
    """Ranks the patches by one row of attention, `[M, N]` fp32. No options."""

    published: ClassVar[str] = "arXiv 2412.01818v1, Theia-4869/FasterVLM"
    reproduces: ClassVar[str] = (
        "LLaVA-NeXT-7B at 320 of 2880: GQA 56.9, POPE 83.6, TextVQA 56.5 (arXiv 2510.02912, Table 3; which row is "
        "whose rests on the order of a list)"
    )

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        return (summary_attention(tower, tower.feature_layer),)

    def notes(self, tower: TowerInfo) -> tuple[str, ...]:
        if tower.has_cls:
            return ()
        return ("extension: no [CLS] in this tower, the attention that patches receive stands in",)

    def score(self, view: View) -> Tensor:
        (signal,) = self.signals(view.tower)
        return view.signal(signal.name, signal.layer, *signal.settings)
