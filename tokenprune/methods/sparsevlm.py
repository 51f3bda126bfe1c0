"""Keeps what the words that match the picture attend to, in three steps (SparseVLM+, v2.0 of SparseVLM).

Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", Zhang et al., ICML 2025,
https://arxiv.org/abs/2410.04417.
Official code: Gumpest/SparseVLMs at 26a5f48, its v2.0.
Licence: Apache-2.0 upstream; this file was written from the formulas, no code was copied.

Raters are chosen once, from what enters layer 0: the text tokens that get more than the mean, over the visual tokens,
of the softmax over the text of unscaled products (code). After layers 2, 6 and 15 tokens leave: the score is the
attention of the raters in that layer, divided by what rotation alone makes of it, mean over the raters and over the 14
heads in which they attend most to the visual tokens (code). Position ids are kept, nothing is recycled (code, v2.0).

How many stay is the code's lists for 576 tokens: 300, 200, 118 ("192"); 238, 108, 60 ("128"); 246, 54, 28 ("96"); 66,
34, 20 ("64"). `keep` is the last number. Tokens leave behind a layer that has run in full, so a mean over the layers
that counts what enters them (`average=`) is above the official names: 206.8, 144, 113.9 and 81.8.

Our choices, and deviations:
- Between the lists, and for other N in proportion, the first two numbers are interpolated in the last one; below the
  lowest list towards 0, 0, 0 and above the highest towards N, N, N. They are never below the last one.
- Decoders of other depths take the layers 2, 6 and 15 of 32 in proportion.
- The official 14 heads are a constant; decoders of fewer than 28 heads take half of theirs. `heads` says otherwise.
- Each image or video has its own raters and budget; the text is that behind the prompt's last visual token, and all of
  it rates where no token is above the mean. The official code has one image.
- The official code takes at most all but one of the tokens that are there; here a list above that keeps all.
- fp32, and only the rows of the text are formed. Ties go to the lower raster index.
- v1.0 (no division, all heads, recycling of what leaves into cluster tokens) is not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths, Pruner, Stage
from tokenprune.interfaces.signals import RATER_ATTENTION, Signal, TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.registry import register_method

BLOCKS = (2, 6, 15)
HEADS = 14
NATIVE = 576
LISTS = ((0, 0, 0), (66, 34, 20), (246, 54, 28), (238, 108, 60), (300, 200, 118), (NATIVE, NATIVE, NATIVE))


class ListBudget(Budget):
    """What cut `step` (0, 1, 2) keeps of N when the last one keeps k, from the official lists."""

    def __init__(self, keep: int | float, step: int) -> None:
        super().__init__(keep)
        self._step = step

    def tokens(self, num_tokens: int) -> int:
        last = super().tokens(num_tokens)
        if self._step == len(BLOCKS) - 1:
            return last
        at = last * NATIVE / num_tokens
        low, high = next((a, b) for a, b in zip(LISTS, LISTS[1:]) if at <= b[-1])
        share = (at - low[-1]) / (high[-1] - low[-1])
        wanted = low[self._step] + share * (high[self._step] - low[self._step])
        return min(num_tokens, max(last, math.floor(wanted * num_tokens / NATIVE + 0.5)))


@register_method("sparsevlm")
@dataclass
class SparseVLM(Pruner):
    """Ranks the visual tokens `[M, N]` by the attention of the text that matches them, at three layers.

    Attributes:
        layers: three decoder layers before which tokens leave, 0-based, increasing; None means those behind layers 2, 6
            and 15 of 32, in proportion: 3, 7 and 16.
        heads: how many heads count; None means the official 14, or half of them where there are fewer than 28.
    """

    site: ClassVar[str] = "layer"
    default_scope: ClassVar[str] = "visual"
    published_positions: ClassVar[str] = "keep"
    text_aware: ClassVar[bool] = True
    published: ClassVar[str] = "arXiv 2410.04417, Gumpest/SparseVLMs (v2.0)"
    reproduces: ClassVar[str] = ""
    plan_options: ClassVar[tuple[str, ...]] = ("layers",)

    layers: tuple[int, ...] | list[int] | None = None
    heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads is not None and (isinstance(self.heads, bool) or self.heads < 1):
            raise ValueError(f"heads must be a whole number from 1 on, got {self.heads!r}.")
        if self.layers is None:
            return
        layers = list(self.layers)
        if any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in layers):
            raise ValueError(f"layers must be decoder layers from 1 on, like [3, 7, 16], got {self.layers!r}.")
        if layers != sorted(set(layers)) or len(layers) != len(BLOCKS):
            raise ValueError(f"layers must be {len(BLOCKS)} that increase, like [3, 7, 16], got {self.layers!r}.")

    def stages(self, budget: Budget, depths: ModelDepths) -> tuple[Stage, ...]:
        last = depths.decoder - 1
        scaled = [min(math.floor(block * depths.decoder / 32 + 0.5) + 1, last) for block in BLOCKS]
        wanted = list(self.layers or [max(layer, depths.first_cut) for layer in scaled])
        # where cuts of a shallow decoder fall together, the later one counts
        steps = {layer: step for step, layer in enumerate(wanted)}
        return tuple(Stage(f"layer:{layer}", self, ListBudget(budget.keep, step)) for layer, step in steps.items())

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        if place != "layer":
            raise ValueError(
                f"sparsevlm ranks by attention inside the decoder, so it acts at 'layer:K', not at {place!r}."
            )
        return (Signal(RATER_ATTENTION, depth - 1, (self.heads or 0,)),)

    def score(self, view: View) -> Tensor:
        return view.signal(RATER_ATTENTION, view.depth - 1, self.heads or 0)
