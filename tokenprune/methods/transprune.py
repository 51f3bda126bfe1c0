"""Keeps tokens that the layers still change and that the instruction attends to, in three middle layers (TransPrune).

Paper: "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model", Li et al., CVPR 2026,
https://arxiv.org/abs/2507.20630 (main text read; its supplement was not available).
Official code: liaolea/TransPrune at c9e8284 (23 Feb 2026).
Licence: MIT upstream; this file was written from the formulas, no code was copied.
Published: LLaVA-1.5-7B, High and Low: GQA 61.4 and 60.0 of 61.9, POPE 85.0 and 85.1 of 85.9, TextVQA 57.8 and 56.5
of 58.2, MME-P 1540 and 1491 of 1506, at 1.56 and 1.19 of 3.82 TFLOPs (paper).

What a branch (attention or MLP) of a layer does to a token is m, the length of its output over that of its input, and
c, their cosine; input is what the branch's norm gives, output is taken before the residual is added. Token transition
variation is w m, w being the softmax of 1 - c over the tokens, summed over both branches and over the layers from the
one before the first cut on: 7 to 12, counted from 1. Instruction-guided attention is the mean over heads, and over all
text behind the visual tokens, of the attention to each visual token, by the projections of the layer before which
tokens leave, on what would enter it, softmax over all keys. Tokens leave before layers 7, 9 and 12, counted from 0
("after layers 7, 9 and 12"); the score is alpha TTV + (1 - alpha) IGA.

    m = |f(x)| / |x|,  c = cos(f(x), x),  w = softmax(1 - c)
    TTV = sum w m  over branches and layers,  score = alpha TTV + (1 - alpha) IGA

Paper and code differ, `variant` chooses. "official": w is over all positions of the prompt, TTV and IGA are each
brought to sum 1 over the visual tokens, alpha is the even sum. "paper": the direction term is 1 - |c|, w is over the
visual tokens alone, and nothing is brought to sum 1. Positions are closed up at every cut (code; the paper is silent).
What was published with code is "official".

`schedule` says how many times `keep` is there after each cut. "high" (7, 5, 1) with keep = 1/8 is the official 504,
360, 72 of 576 and 2520, 1800, 360 of 2880, and gives the published 1.56 and 8.33 TFLOPs. "combined" (4, 2, 1) is for
use behind a method at the input: it reproduces 288, 144, 72, 36 with the published 0.66 and 192, 96, 48, 24 with 0.44
TFLOPs (inferred from these). "low" (13, 5, 1) with keep = 0.05 is our choice: the paper's Low is in the supplement
(unverified); this one gives its 1.19 and 6.41 TFLOPs, and other ratios do so about as well.

Our choices, and deviations:
- Decoders of fewer than 28 layers take 7, 9 and 12 of 32 in proportion. Those of 28 cut at 7, 9 and 12 as well: the
  main text does not say, but its 45.1 % of the FLOPs for Qwen2.5-VL is what layers 7, 9 and 12 of 28 give.
- The official softmax w runs over the whole batch, which it can do for one prompt only; here it is by prompt, padding
  not counted.
- Each image or video has its own budget and its own sums; the official code tracks the first image only. The
  instruction is the text behind the last of them; where there is none, the last token stands in.
- The official code computes transitions at each decoded token too, where nothing is made of them; here at prefill only.
- Row-end tokens of LLaVA-NeXT neither compete nor count, and leave with the first cut, as everywhere here; in the
  official code they are tokens like any other.
- Tokens that an intervention keeps out of a ranking (VAR's sinks) keep the history that they had, without what layers
  before that ranking did to them since.
- Counts are rounded down, also for a fraction (code). Ties go to the lower raster index.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths, Pruner, Stage
from tokenprune.interfaces.selection import Selection, topk_indices
from tokenprune.interfaces.signals import (
    ATTENTION_COSINE,
    ATTENTION_GAIN,
    ATTENTION_TURN,
    INSTRUCTION_ATTENTION,
    MLP_COSINE,
    MLP_GAIN,
    MLP_TURN,
    Signal,
    TowerInfo,
)
from tokenprune.interfaces.view import View
from tokenprune.registry import near, register_method

SCHEDULES: dict[str, tuple[float, ...]] = {"high": (7, 5, 1), "low": (13, 5, 1), "combined": (4, 2, 1)}
VARIANTS = ("official", "paper")
LAYERS = (7, 9, 12)

_HISTORY = "transprune"
_GAINS = (ATTENTION_GAIN, MLP_GAIN)
_TURNS = {"official": (ATTENTION_TURN, MLP_TURN), "paper": (ATTENTION_COSINE, MLP_COSINE)}


class MultipleBudget(Budget):
    """So many times what the last cut keeps, rounded down and at most all."""

    def __init__(self, keep: int | float, times: float) -> None:
        super().__init__(keep)
        self._times = times

    def tokens(self, num_tokens: int) -> int:
        last = self.keep if isinstance(self.keep, int) else self.keep * num_tokens
        # a hair above, so that 0.05 * 13 of 100 is 65
        return min(num_tokens, max(1, math.floor(last * self._times + 1e-9)))


def default_layers(depths: ModelDepths) -> tuple[int, ...]:
    """Where the three cuts stand: 7, 9 and 12, in proportion in decoders of fewer than 28 layers (our choice)."""
    scale = 1.0 if depths.decoder >= 28 else depths.decoder / 32
    return tuple(math.floor(layer * scale + 0.5) for layer in LAYERS)


@register_method("transprune")
@dataclass
class TransPrune(Pruner):
    """Ranks the visual tokens `[M, N]` by how layers change them and by the instruction's attention, at three layers.

    Attributes:
        schedule: how many times `keep` is there after each cut: "high", "low", "combined", or numbers that do not
            increase and end in 1.
        layers: decoder layers before which tokens leave, 0-based, increasing, one for each number of the schedule;
            None means 7, 9 and 12.
        alpha: weight of the transition against that of the instruction's attention, in [0, 1].
        variant: "official" or "paper", see the module.
    """

    site: ClassVar[str] = "layer"
    default_scope: ClassVar[str] = "visual"
    adaptive: ClassVar[bool] = True  # a cut that keeps all still adds to the transition
    published: ClassVar[str] = "arXiv 2507.20630, liaolea/TransPrune"
    text_aware: ClassVar[bool] = True
    plan_options: ClassVar[tuple[str, ...]] = ("schedule",)

    schedule: str | tuple[float, ...] | list[float] = "high"
    layers: tuple[int, ...] | list[int] | None = None
    alpha: float = 0.5
    variant: str = "official"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}.")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be a weight from 0 to 1, got {self.alpha!r}.")
        times = self.times
        if not times or any(b > a for a, b in zip(times, times[1:])) or times[-1] != 1:
            raise ValueError(
                f"schedule says how many times keep is there after each cut, so its numbers do not increase and end in "
                f"1, got {self.schedule!r}."
            )
        if self.layers is None and len(times) == len(LAYERS):
            return
        layers = list(self.layers or ())
        if any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in layers):
            raise ValueError(f"layers must be decoder layers from 1 on, like [7, 9, 12], got {self.layers!r}.")
        if layers != sorted(set(layers)) or len(layers) != len(times):
            raise ValueError(
                f"layers must increase, one for each of the {len(times)} numbers of the schedule, got {self.layers!r}."
            )

    @property
    def times(self) -> tuple[float, ...]:
        """The schedule in numbers."""
        if not isinstance(self.schedule, str):
            return tuple(self.schedule)
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"There is no schedule {self.schedule!r}.{near(self.schedule, list(SCHEDULES))} Schedules: "
                f"{', '.join(SCHEDULES)}, or numbers like [7, 5, 1]."
            )
        return SCHEDULES[self.schedule]

    def stages(self, budget: Budget, depths: ModelDepths) -> tuple[Stage, ...]:
        wanted = self.layers or [max(layer, depths.first_cut) for layer in default_layers(depths)]
        # where cuts of a shallow decoder fall together, the later one counts
        times = dict(zip(wanted, self.times))
        scheduled = dataclasses.replace(self, layers=tuple(times), schedule=tuple(times.values()))
        return tuple(Stage(f"layer:{k}", scheduled, MultipleBudget(budget.keep, t)) for k, t in times.items())

    def window(self, depth: int) -> range:
        """Layers whose transitions are added at the cut before layer `depth`: those since the cut before it."""
        before = [layer for layer in self.layers or () if layer < depth]
        return range(before[-1] if before else depth - 1, depth)

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        if place != "layer":
            raise ValueError(
                f"transprune reads what decoder layers do to the tokens, so it acts at 'layer:K', not at {place!r}."
            )
        names = (*_GAINS, *_TURNS[self.variant])
        return (Signal(INSTRUCTION_ATTENTION, depth), *(Signal(n, k) for k in self.window(depth) for n in names))

    def transition(self, view: View, layer: int) -> Tensor:
        """TTV of one layer, both branches, `[M, N]` fp32."""
        total = torch.zeros((), device=view.features.device)
        for gain, turn in zip(_GAINS, _TURNS[self.variant]):
            weight = view.signal(turn, layer)
            if self.variant == "paper":
                weight = (1 - weight.abs()).softmax(dim=1)
            total = total + weight * view.signal(gain, layer)
        return total

    def accumulated(self, view: View) -> Tensor:
        """TTV of all layers up to this cut, `[M, N]` fp32."""
        total = view.carry.get(_HISTORY)
        for layer in self.window(view.depth):
            now = self.transition(view, layer)
            total = now if total is None else total + now
        if total is None:
            raise ValueError(f"transprune read no layer at {view.site!r}.")
        return total

    def combine(self, transition: Tensor, attention: Tensor) -> Tensor:
        """The score `[M, N]` of accumulated TTV and IGA."""
        if self.variant == "official":
            transition = transition / (transition.sum(dim=1, keepdim=True) + 1e-8)
            attention = attention / (attention.sum(dim=1, keepdim=True) + 1e-8)
        return self.alpha * transition + (1 - self.alpha) * attention

    def select(self, view: View) -> Selection:
        transition = self.accumulated(view)
        if view.budget in (0, view.num_tokens):
            kept = torch.arange(view.budget, device=view.features.device).expand(view.num_images, -1)
        else:
            attention = view.signal(INSTRUCTION_ATTENTION, view.depth)
            kept = topk_indices(self.combine(transition, attention), view.budget)
        return Selection(kept, carry={_HISTORY: transition})
