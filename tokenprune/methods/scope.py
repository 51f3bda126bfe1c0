"""Keeps tokens that [CLS] attends to and that stand for what no kept one is like: saliency times coverage (SCOPE).

Paper: "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs", Deng et al., NeurIPS 2025,
https://arxiv.org/abs/2510.24214 (only the abstract could be read).
Official code: kinredon/SCOPE at 6bf7306 (31 Oct 2025); what follows is the code's behaviour.
Licence: none stated upstream; this file was written from the formulas, no code was copied.

Again and again the token with the highest gain x a^alpha is taken: a is [CLS]'s attention in the feature layer, the
gain is what the token adds to the coverage of all tokens of its picture, by cosine of the hidden states behind that
layer.

    next = argmax_i a_i^alpha sum_j max(0, cos(x_i, x_j) - c_j),  c_j = max_{s in S} cos(x_s, x_j)

Deviations:
- Lazy greedy, with the same choices (our exact speed-up), in fp32; the official code works in half precision.
- Once nothing is gained by saliency times coverage, tokens come by coverage, then by saliency (our choice); in the
  official code by index.
- LLaVA-NeXT: crops share the budget by size and no token of it is lost; the official code rounds down for each crop.
- Without [CLS] (ours, labelled in reports): the attention that patches receive, and the tokens as the decoder
  gets them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, refuse_nan
from tokenprune.interfaces.signals import TOWER_STATES, Signal, TowerInfo, summary_attention
from tokenprune.interfaces.view import View
from tokenprune.kernels.greedy_coverage import greedy_coverage, greedy_coverage_flops
from tokenprune.registry import near, register_method

RULES = ("product", "sum")


@register_method("scope")
@dataclass
class Scope(Pruner):
    """Picks k of N tokens by attention `[M, N]` and coverage of states `[M, N, C]`.

    Attributes:
        alpha: exponent of the attention, from 0 (coverage alone, no attention is read) on; 1 in the code.
        rule: "product", or "sum": gain + a^alpha with a summed over heads, a switch of the code.
    """

    published: ClassVar[str] = "arXiv 2510.24214, kinredon/SCOPE"
    reproduces: ClassVar[str] = (
        "LLaVA-1.5-7B at 64 of 576: 96.0 % of the unpruned average of 8 benchmarks (arXiv 2606.27161)"
    )

    alpha: float = 1.0
    rule: str = "product"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be an exponent from 0 on, got {self.alpha!r}.")
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}.{near(self.rule, RULES)}")

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        layer = tower.feature_layer
        attention = (summary_attention(tower, layer),) if self.alpha else ()
        return (*attention, Signal(TOWER_STATES, layer)) if tower.has_cls else attention

    def notes(self, tower: TowerInfo) -> tuple[str, ...]:
        if tower.has_cls:
            return ()
        return ("extension: no [CLS] in this tower; received attention, and the tokens as the decoder gets them",)

    def order(self, view: View) -> Tensor:
        """`[M, k]` int64, the kept tokens in the order of choice: the first j are the choice for a budget of j."""
        given = [view.signal(s.name, s.layer, *s.settings) for s in self.signals(view.tower)]
        states = given.pop() if view.tower.has_cls else view.features
        for values in (*given, states):
            refuse_nan(values)
        if given:
            # the code sums over heads: a scale that decides where it is added to the gain
            weights = (given[0] * view.tower.num_heads) ** self.alpha if self.rule == "sum" else given[0] ** self.alpha
        else:
            weights = torch.ones_like(states[..., 0], dtype=torch.float32)
        return greedy_coverage(states, weights, view.budget, self.rule == "sum")

    def select(self, view: View) -> Selection:
        return Selection(self.order(view).sort(dim=1).values)

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        return greedy_coverage_flops(num_images, num_tokens, tower.hidden_size if tower.has_cls else width)
