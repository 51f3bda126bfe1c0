"""Drops patches inside the vision tower, as information flows from them to [CLS] (FlowCut, vision stage).

Paper: "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", Tong et al., NeurIPS
2025, https://arxiv.org/abs/2505.19536.
Official code: TungChintao/FlowCut at a2ecd24 (19 Sep 2025).
Licence: Apache-2.0 upstream; this file was written from the formulas, no code was copied.

After each block a patch j has the score S_j = (a_j + m_j) d_j: a is the [CLS] row of the attention and m the softmax of
[CLS]'s value vector with each value vector, both mean over heads and normalised to sum to 1 over the patches; d is the
L1 norm of the head-mean value vector. A running mean carries it: C = 0.5 C + 0.5 S, at every block (code). With R
blocks left before the one that must be short (R = F - 1 - block, F the feature block), patches leave where R is even:
P = round((N - T) / sqrt(R) * (1 - r^2)) of them, r being the entropy of a over ln N; at R = 0 all but T (code). The
block that follows runs on what is left, so the tower itself gets cheaper.

Paper and code differ: the pseudocode scales the value product by sqrt(D) and leaves [CLS] out of both softmaxes; the
code does neither and normalises afterwards. This is the code's form.

Deviations:
- P is computed for each image. The official code takes the maximum over the batch, so that an image's result depends on
  its batch mates.
- The entropy is computed in fp32 with 0 ln 0 = 0; the official code gives NaN where fp16 underflows.
- Several crops share the budget in proportion to their patches. The official LLaVA-NeXT code keeps T / 2 per crop and
  cuts to T at decoder layer 1, with the text; that second cut is not here.
- Towers without [CLS]: mean-query attention stands in for a, and there is no m, as in the official Qwen2-VL code. On
  SigLIP towers this is an extension of ours.
- Qwen towers: the 2 x 2 patches of a visual token leave or stay together, by the mean of their scores; the official
  code drops single patches, so that the merger joins four survivors that need not be neighbours. The last cut is before
  the last block; officially it is after it, to twice the target, with a second cut in the decoder.
- Ties go to the lower raster index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.base import Pruner, View
from tokenprune.budget import Budget
from tokenprune.registry import register_method
from tokenprune.selection import Selection, refuse_nan
from tokenprune.signals import CLS_VALUE_SIMILARITY, VALUE_NORM, Signal, Tower, stand_in_note, summary_attention
from tokenprune.stages import Depths, Stage

_HISTORY = "flowcut"


def entropy_ratio(attention: Tensor) -> Tensor:
    """Entropy of rows `[M, N]` that sum to 1, over ln N: 1 for even rows, 0 for one-hot ones. `[M]` fp32."""
    values = attention.float()
    return -torch.special.xlogy(values, values).sum(dim=1) / math.log(max(values.shape[1], 2))


def drop_count(num_tokens: int, target: int, left: int, ratio: float) -> int:
    """P, how many of N patches leave when `left` blocks remain (0: all above the target)."""
    if left == 0:
        return num_tokens - target
    wanted = (num_tokens - target) / math.sqrt(left) * (1 - ratio**2)
    return min(max(round(wanted), 0), num_tokens - target)


@register_method("flowcut")
@dataclass
class FlowCut(Pruner):
    """Cuts the patches `[M, N]` of a picture to T, step by step, in the blocks of the vision tower.

    Attributes:
        history: weight of the running score against that of the present block, in [0, 1); 0.5 is the paper's.
        interval: blocks from one cut to the next; 2 is the paper's.
    """

    site: ClassVar[str] = "vision"
    adaptive: ClassVar[bool] = True
    published: ClassVar[str] = "arXiv 2505.19536, TungChintao/FlowCut"

    history: float = 0.5
    interval: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.history < 1:
            raise ValueError(f"history must be a weight from 0 to below 1, got {self.history!r}.")
        if isinstance(self.interval, bool) or self.interval < 1:
            raise ValueError(f"interval must be at least 1 block, got {self.interval!r}.")

    def stages(self, budget: Budget, depths: Depths) -> tuple[Stage, ...]:
        last = -1 if depths.feature is None else depths.feature - 1
        blocks = [block for block in range(last + 1) if (last - block) % self.interval == 0]
        # where the tower cannot be cut, the plan's own check says so
        return tuple(Stage(f"vision:{block}", self, budget) for block in blocks or [0])

    def blocks(self, depth: int, tower: Tower) -> range:
        """Blocks that are scored at the cut after block `depth`: those since the cut before it."""
        first = (tower.feature_layer - 1) % self.interval
        return range(0 if depth == first else depth - self.interval + 1, depth + 1)

    def signals_at(self, tower: Tower, place: str, depth: int) -> tuple[Signal, ...]:
        if place != "vision":
            raise ValueError(f"flowcut cuts inside the vision tower, at 'vision:L', not at {place!r}.")
        names = (VALUE_NORM, CLS_VALUE_SIMILARITY) if tower.has_cls else (VALUE_NORM,)
        found = [Signal(name, block) for block in self.blocks(depth, tower) for name in names]
        return (*found, *(summary_attention(tower, block) for block in self.blocks(depth, tower)))

    def notes(self, tower: Tower) -> tuple[str, ...]:
        return stand_in_note(tower)

    def block_score(self, view: View, block: int) -> Tensor:
        """S after one block, `[M, N]` fp32."""
        total = self._attention(view, block)
        if view.tower.has_cls:
            similar = view.signal(CLS_VALUE_SIMILARITY, block)
            total = total + similar / similar.sum(dim=1, keepdim=True)
        return total * view.signal(VALUE_NORM, block)

    @staticmethod
    def _attention(view: View, block: int) -> Tensor:
        attention = view.signal(summary_attention(view.tower, block).name, block)
        return attention / attention.sum(dim=1, keepdim=True)

    def select(self, view: View) -> Selection:
        num_tokens, target = view.num_tokens, view.budget
        everything = torch.arange(num_tokens, device=view.features.device).expand(view.num_images, -1)
        if num_tokens <= target:
            return Selection(everything)
        depth = int(view.site.partition(":")[2])
        score = view.carry.get(_HISTORY)
        for block in self.blocks(depth, view.tower):
            now = self.block_score(view, block)
            score = now if score is None else self.history * score + (1 - self.history) * now
        if score is None:
            raise ValueError(f"flowcut scored no block at {view.site!r}.")
        refuse_nan(score)
        left = view.tower.feature_layer - 1 - depth
        ratios = entropy_ratio(self._attention(view, depth)).tolist() if left else [0.0] * view.num_images
        counts = [num_tokens - drop_count(num_tokens, target, left, ratio) for ratio in ratios]
        order = torch.sort(score, dim=1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(1, order, everything)
        stays = rank < torch.tensor(counts, device=order.device)[:, None]
        kept = torch.where(stays, everything, num_tokens).sort(dim=1).values[:, : max(counts)]
        return Selection(kept, counts=counts, carry={_HISTORY: score})
