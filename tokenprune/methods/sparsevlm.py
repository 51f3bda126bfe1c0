"""Keeps what the words that match the picture attend to, in three steps (SparseVLM+, v2.0 of SparseVLM).

Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", Zhang et al., ICML 2025,
https://arxiv.org/abs/2410.04417.
Official code: Gumpest/SparseVLMs at 26a5f48, its v2.0; v1.0 by the same reading of it.
Licence: Apache-2.0 upstream; this file was written from the formulas, no code was copied.
Published: LLaVA-1.5-7B at 192 / 128 / 64 of 576: GQA 59.5 / 58.4 / 53.8, POPE 85.4 / 85.0 / 77.5, TextVQA 57.7 / 56.6
/ 53.5 (re-run in one environment by RESTORE, arXiv 2606.01711, Table 1; which version of the code is unverified).

Raters are chosen once, from what enters layer 0: the text tokens that get more than the mean, over the visual tokens,
of the softmax over the text of unscaled products (code). After layers 2, 6 and 15 tokens leave: the score is the
attention of the raters in that layer, divided by what rotation alone makes of it, mean over the raters and over the 14
heads in which they attend most to the visual tokens (code). Position ids are kept, nothing is recycled (code, v2.0).

    R_t = mean_v softmax_t(x_v x_t),  raters: R_t > mean R
    s_j = mean over raters t and heads h of A_h[t, j] / what rotation alone gives

`version="v1"`: nothing is divided, all heads count, and position ids close up (code). Of the p tokens that leave, the m
= floor(0.3 p) + 1 with the highest scores form c = floor(m / 10) + 1 clusters by density peaks of what enters the layer
behind the cut (`_density_peaks`), and each cluster's plain mean stays (code); the others are lost.

How many stay is the code's lists for 576 tokens: 300, 200, 118 ("192"); 238, 108, 60 ("128"); 246, 54, 28 ("96"); 66,
34, 20 ("64"). `keep` is the last number. Tokens leave behind a layer that has run in full, so a mean over the layers
that counts what enters them (`average=`) is above the official names: 206.8, 144, 113.9 and 81.8. The lists of v1 are
of what is ranked: 300, 200, 110 ("192"); 303, 110, 36 ("128"); 238, 48, 26 ("96"); 66, 30, 17 ("64"). As in the code
clusters come on top of them; `keep` counts both, so that the budget is exact: 113, 39, 27 and 18.

Our choices, and deviations:
- Between the lists, and for other N in proportion, the first two numbers are interpolated in the last one; below the
  lowest list towards 0, 0, 0 and above the highest towards N, N, N. They are never below the last one.
- Decoders of other depths take the layers 2, 6 and 15 of 32 in proportion.
- The official 14 heads are a constant; decoders of fewer than 28 heads take half of theirs. `heads` says otherwise.
- Each image or video has its own raters and budget; the text is that behind the prompt's last visual token, and all of
  it rates where no token is above the mean. The official code has one image.
- The official code takes at most all but one of the tokens that are there; here a list above that keeps all.
- fp32, and only the rows of the text are formed. Ties go to the lower raster index.
- v1: a cluster stands where its centre stood, in raster order; officially all stand behind the ranked tokens. The
  official noise on densities (1e-6, not seeded) is left out. Of a budget that several numbers of ranked tokens fit, the
  largest number is taken; one too small for the clusters has one ranked token, and as many clusters as are left.
  `key_bias` is off; switched on, a cluster weighs as many tokens as went into it, at earlier cuts too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths, Pruner, Stage
from tokenprune.interfaces.selection import Selection, refuse_nan, topk_indices
from tokenprune.interfaces.signals import RATER_ATTENTION, Signal, TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.kernels.merge import merge
from tokenprune.methods._density_peaks import density_peaks
from tokenprune.registry import near, register_method

BLOCKS = (2, 6, 15)
HEADS = 14
NATIVE = 576
LISTS = ((66, 34, 20), (246, 54, 28), (238, 108, 60), (300, 200, 118))
RANKED_V1 = ((66, 30, 17), (238, 48, 26), (303, 110, 36), (300, 200, 110))
VERSIONS = ("v2", "v1")
SIZES = "sparsevlm_sizes"


def loose_and_clusters(left: int) -> tuple[int, int]:
    """m, how many of `left` tokens that leave are clustered, and c, into how many."""
    loose = 3 * left // 10 + 1
    return loose, loose // 10 + 1


def ranked_and_clusters(num_tokens: int, budget: int) -> tuple[int, int]:
    """How many of N tokens stay as they are, and how many clusters stand beside them; together the budget, below N."""
    for ranked in range(budget - 1, 0, -1):
        clusters = loose_and_clusters(num_tokens - ranked)[1]
        if ranked + clusters == budget:
            return ranked, clusters
    return 1, budget - 1


def _with_clusters(ranked: tuple[int, ...]) -> tuple[int, ...]:
    there, counts = NATIVE, []
    for count in ranked:
        there = count + loose_and_clusters(there - count)[1]
        counts.append(there)
    return tuple(counts)


LISTS_V1 = tuple(_with_clusters(ranked) for ranked in RANKED_V1)


class ListBudget(Budget):
    """What cut `step` (0, 1, 2) keeps of N when the last one keeps k, from the official lists."""

    def __init__(self, keep: int | float, step: int, lists: tuple[tuple[int, ...], ...] = LISTS) -> None:
        super().__init__(keep)
        self._step, self._lists = step, ((0, 0, 0), *lists, (NATIVE, NATIVE, NATIVE))

    def tokens(self, num_tokens: int) -> int:
        last = super().tokens(num_tokens)
        if self._step == len(BLOCKS) - 1:
            return last
        at = last * NATIVE / num_tokens
        low, high = next((a, b) for a, b in zip(self._lists, self._lists[1:]) if at <= b[-1])
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
        heads: how many heads count; None means the official 14, or half of them where there are fewer than 28. In v1
            all do.
        version: "v2" or "v1", which merges, see the module.
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
    version: str = "v2"

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise ValueError(
                f"version must be one of {', '.join(VERSIONS)}, got {self.version!r}."
                f"{near(str(self.version), list(VERSIONS))}"
            )
        super().__post_init__()
        if self.heads is not None and (isinstance(self.heads, bool) or self.heads < 1):
            raise ValueError(f"heads must be a whole number from 1 on, got {self.heads!r}.")
        if self.heads is not None and self.version == "v1":
            raise ValueError(f"All heads count in version='v1', got heads={self.heads!r}. Leave heads out.")
        if self.layers is None:
            return
        layers = list(self.layers)
        if any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in layers):
            raise ValueError(f"layers must be decoder layers from 1 on, like [3, 7, 16], got {self.layers!r}.")
        if layers != sorted(set(layers)) or len(layers) != len(BLOCKS):
            raise ValueError(f"layers must be {len(BLOCKS)} that increase, like [3, 7, 16], got {self.layers!r}.")

    @property
    def is_merging(self) -> bool:
        return self.version == "v1"

    @property
    def own_positions(self) -> str:
        return "compact" if self.version == "v1" else self.published_positions

    def stages(self, budget: Budget, depths: ModelDepths) -> tuple[Stage, ...]:
        last = depths.decoder - 1
        scaled = [min(math.floor(block * depths.decoder / 32 + 0.5) + 1, last) for block in BLOCKS]
        wanted = list(self.layers or [max(layer, depths.first_cut) for layer in scaled])
        # where cuts of a shallow decoder fall together, the later one counts
        steps = {layer: step for step, layer in enumerate(wanted)}
        lists = LISTS_V1 if self.version == "v1" else LISTS
        return tuple(
            Stage(f"layer:{layer}", self, ListBudget(budget.keep, step, lists)) for layer, step in steps.items()
        )

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        if place != "layer":
            raise ValueError(
                f"sparsevlm ranks by attention inside the decoder, so it acts at 'layer:K', not at {place!r}."
            )
        return (Signal(RATER_ATTENTION, depth - 1, self._settings),)

    @property
    def _settings(self) -> tuple[int, int]:
        """Heads, and whether rotation is divided away."""
        return (-1, 0) if self.version == "v1" else (self.heads or 0, 1)

    def score(self, view: View) -> Tensor:
        return view.signal(RATER_ATTENTION, view.depth - 1, *self._settings)

    def select(self, view: View) -> Selection:
        score = self.score(view)
        if self.version == "v2":
            return Selection(topk_indices(score, view.budget))
        refuse_nan(score)
        refuse_nan(view.features)
        count, clusters = ranked_and_clusters(view.num_tokens, view.budget)
        kept = topk_indices(score, count)
        if not clusters:
            return Selection(kept, sizes=self._sizes(view, score).gather(1, kept), merged=torch.zeros_like(score[:, 0]))
        loose, _ = loose_and_clusters(view.num_tokens - count)
        rest = topk_indices(score.scatter(1, kept, -torch.inf), loose)  # [M, m]
        states = _rows(view.features, rest)
        centres, cluster = density_peaks(states, clusters)
        merged = merge(states, cluster, clusters)
        sizes = self._sizes(view, score)
        members = torch.zeros_like(merged[..., 0], dtype=torch.float32).scatter_add(1, cluster, sizes.gather(1, rest))
        slots = rest.gather(1, centres)
        sizes = sizes.scatter(1, slots, members)
        places, order = torch.cat([kept, slots], dim=1).sort(dim=1)
        features = _rows(torch.cat([_rows(view.features, kept), merged], dim=1), order)
        went = torch.full_like(score[:, 0], loose - clusters)
        return Selection(places, features, carry={SIZES: sizes}, sizes=sizes.gather(1, places), merged=went)

    def _sizes(self, view: View, score: Tensor) -> Tensor:
        """`[M, N]` fp32: how many tokens each stands for since the first cut."""
        return view.carry[SIZES].to(score.device) if SIZES in view.carry else torch.ones_like(score)


def _rows(features: Tensor, places: Tensor) -> Tensor:
    """`[M, n, D]` of `[M, N, D]` at `[M, n]`."""
    return features.gather(1, places[..., None].expand(-1, -1, features.shape[2]))
