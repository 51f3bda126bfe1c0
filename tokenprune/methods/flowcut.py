"""Drops patches inside the vision tower, as information flows from them to [CLS] (FlowCut).

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

    S_j = (a_j + m_j) d_j,  C = 0.5 C + 0.5 S
    P = round((N - T) / sqrt(R) * (1 - r^2)),  r = entropy(a) / ln N

Models of many visual tokens (LLaVA-NeXT, Qwen2-VL) get a second cut (code). The tower keeps more: T / 2 rounded down
of each crop where an image comes in several, else 2 T. Decoder layers 0 and 1 see those that are left, and behind layer
1 the T with the highest S stay, if there are more: a and m are the softmax, over the visual tokens alone, of the last
prompt token's query with their keys and of its value with their values, both scaled, d as above, no running mean. What
follows has closed positions. Models whose images all have the same few tokens (LLaVA-1.5) have no such cut, and with
`text_stage=False` no model has: the tower then keeps T.

Paper and code differ, `variant` chooses. "paper": the value product is divided by sqrt(D), D being a head's width (our
reading), [CLS] is left out of both softmaxes, the tower keeps 2 T in all whatever the crops, and on towers without
[CLS] the mean value vector stands in m. "official": the value product is not scaled, [CLS] is in both softmaxes and
leaves before they are brought to sum 1, and towers without [CLS] have no m. The rest is the code's in both.

Deviations:
- P is computed for each image. The official code takes the maximum over the batch, so that an image's result depends on
  its batch mates.
- A patch row without any weight has no sum to be brought to 1: where [CLS] is so like itself alone that m, or a, is 0
  in fp32 for all patches, the code's 0 / 0 is NaN. Here such a row counts as even, 1 / N for each patch, so that the
  other factors rank; an even a has r = 1.
- The entropy is computed in fp32 with 0 ln 0 = 0; the official code gives NaN where fp16 underflows.
- Frames of a video share 2 T in proportion to their patches: that the tower keeps twice as much of videos, too, is our
  choice; the paper gives 32 tokens for each of 8 frames, and no code was released.
- Towers without [CLS]: mean-query attention stands in for a, as in the official Qwen2-VL code. On SigLIP towers this is
  an extension of ours.
- Qwen towers: the 2 x 2 patches of a visual token leave or stay together. Their score is the product of their mean a
  and their mean d, and the entropy is over such groups; the official code scores and drops single patches, so that the
  merger joins four survivors that need not be neighbours. The last cut is before the last block; officially it is after
  it. Tokens that stay keep their own 3-D positions; the official code gives the decoder the first 2 T of the grid. The
  official code is for Qwen2-VL; that the method suits the windows of Qwen2.5-VL's tower is unverified.
- One cut at a site of the user's own (`at="vision:L"`) scores all blocks so far and leaves T.
- In the decoder each image or video keeps its own T; the official code takes all images of a prompt for one. Families
  that add visual features inside the decoder are cut behind the last layer that does.
- Ties go to the lower raster index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths, Pruner, Stage
from tokenprune.interfaces.selection import Selection, refuse_nan
from tokenprune.interfaces.signals import (
    CLS_ATTENTION,
    CLS_PATCH_ATTENTION,
    CLS_PATCH_SIMILARITY,
    CLS_VALUE_SIMILARITY,
    DECODER_VALUE_NORM,
    LAST_VALUE_SIMILARITY,
    LAST_VISUAL_ATTENTION,
    MEAN_QUERY_ATTENTION,
    MEAN_VALUE_SIMILARITY,
    VALUE_NORM,
    Signal,
    TowerInfo,
)
from tokenprune.interfaces.view import View
from tokenprune.interfaces.visual import Visual
from tokenprune.registry import register_method

VARIANTS = ("official", "paper")

_HISTORY = "flowcut"
_TEXT_CUT = 2  # behind decoder layer 1


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


class OverBudget(Budget):
    """What the tower keeps where a second cut follows: T / 2 of each crop of an image, or twice T in all."""

    def __init__(self, keep: int | float, by_crop: bool) -> None:
        super().__init__(keep)
        self._by_crop = by_crop

    def tokens(self, num_tokens: int) -> int:
        return min(num_tokens, 2 * super().tokens(num_tokens))

    def pictures(self, visual: Visual) -> list[int]:
        crops, target = len(visual.tower_grids), super().tokens(visual.num_tokens)
        if self._by_crop and visual.kind == "image" and crops > 1 and target < visual.num_tokens:
            return [target // 2] * crops
        return super().pictures(visual)


@register_method("flowcut")
@dataclass
class FlowCut(Pruner):
    """Cuts the patches `[M, N]` of a picture to T, step by step, in the blocks of the vision tower.

    Attributes:
        history: weight of the running score against that of the present block, in [0, 1); 0.5 is the paper's.
        interval: blocks from one cut to the next; 2 is the paper's.
        variant: "official" or "paper", see the module.
        text_stage: whether models of many visual tokens get the second cut, by what the last prompt token attends to.
    """

    site: ClassVar[str] = "vision"
    adaptive: ClassVar[bool] = True
    plan_options: ClassVar[tuple[str, ...]] = ("interval", "text_stage")
    published: ClassVar[str] = "arXiv 2505.19536, TungChintao/FlowCut"
    reproduces: ClassVar[str] = (
        "LLaVA-1.5-7B at 64 of 576: GQA 55.6, POPE 80.2, TextVQA 55.6; at 192: 60.1, 86.1, 57.5 (arXiv 2505.19536, "
        "main table)"
    )
    text_aware: ClassVar[bool] = False  # but for the second cut of models of many visual tokens

    history: float = 0.5
    interval: int = 2
    variant: str = "official"
    text_stage: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.history < 1:
            raise ValueError(f"history must be a weight from 0 to below 1, got {self.history!r}.")
        if isinstance(self.interval, bool) or self.interval < 1:
            raise ValueError(f"interval must be at least 1 block, got {self.interval!r}.")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}.")

    def stages(self, budget: Budget, depths: ModelDepths) -> tuple[Stage, ...]:
        last = -1 if depths.feature is None else depths.feature - 1
        blocks = [block for block in range(last + 1) if (last - block) % self.interval == 0]
        layer = max(_TEXT_CUT, depths.first_cut)
        second = self.text_stage and not depths.one_size and layer < depths.decoder
        inside = OverBudget(budget.keep, self.variant == "official") if second else budget
        # where the tower cannot be cut, the plan's own check says so
        stages = [Stage(f"vision:{block}", self, inside) for block in blocks or [0]]
        if second:
            stages.append(Stage(f"layer:{layer}", TextCut(positions=self.positions), budget))
        return tuple(stages)

    def stage_at(self, site: str, budget: Budget) -> Stage:
        return Stage(site, OneCut(**{field.name: getattr(self, field.name) for field in fields(self)}), budget)

    def blocks(self, depth: int, tower: TowerInfo) -> range:
        """Blocks that are scored at the cut after block `depth`: those since the cut before it."""
        first = (tower.feature_layer - 1) % self.interval
        return range(0 if depth == first else depth - self.interval + 1, depth + 1)

    def blocks_left(self, depth: int, tower: TowerInfo) -> int:
        """R, blocks behind the cut after block `depth` before the patches must be down to T."""
        return tower.feature_layer - 1 - depth

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        if place != "vision":
            raise ValueError(f"flowcut cuts inside the vision tower, at 'vision:L', not at {place!r}.")
        names = [name for name in (VALUE_NORM, self._attending(tower), self._similar(tower)) if name]
        return tuple(Signal(name, block) for block in self.blocks(depth, tower) for name in names)

    def _attending(self, tower: TowerInfo) -> str:
        """The signal behind a."""
        if not tower.has_cls:
            return MEAN_QUERY_ATTENTION
        return CLS_PATCH_ATTENTION if self.variant == "paper" else CLS_ATTENTION

    def _similar(self, tower: TowerInfo) -> str | None:
        """The signal behind m; None where there is no m."""
        if self.variant == "official":
            return CLS_VALUE_SIMILARITY if tower.has_cls else None
        return CLS_PATCH_SIMILARITY if tower.has_cls else MEAN_VALUE_SIMILARITY

    def notes(self, tower: TowerInfo) -> tuple[str, ...]:
        if tower.has_cls:
            return ()
        return ("no [CLS] in this tower: the mean query, as in the official Qwen2-VL code (elsewhere an extension)",)

    def block_score(self, view: View, block: int) -> Tensor:
        """S after one block, `[M, N]` fp32."""
        total, similar = self._attention(view, block), self._similar(view.tower)
        if similar is not None:
            total = total + _to_one(view.signal(similar, block))
        return total * view.signal(VALUE_NORM, block)

    def _attention(self, view: View, block: int) -> Tensor:
        return _to_one(view.signal(self._attending(view.tower), block))

    def select(self, view: View) -> Selection:
        num_tokens, target = view.num_tokens, view.budget
        everything = torch.arange(num_tokens, device=view.features.device).expand(view.num_images, -1)
        if num_tokens <= target:
            return Selection(everything)
        depth = view.depth
        score = view.carry.get(_HISTORY)
        for block in self.blocks(depth, view.tower):
            now = self.block_score(view, block)
            score = now if score is None else self.history * score + (1 - self.history) * now
        if score is None:
            raise ValueError(f"flowcut scored no block at {view.site!r}.")
        refuse_nan(score)
        left = self.blocks_left(depth, view.tower)
        ratios = entropy_ratio(self._attention(view, depth)).tolist() if left else [0.0] * view.num_images
        counts = [num_tokens - drop_count(num_tokens, target, left, ratio) for ratio in ratios]
        order = torch.sort(score, dim=1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(1, order, everything)  # [M, N], 0 is the highest score
        stays = rank < torch.tensor(counts, device=order.device)[:, None]
        kept = torch.where(stays, everything, num_tokens).sort(dim=1).values[:, : max(counts)]  # [M, max(counts)]
        return Selection(kept, counts=counts, carry={_HISTORY: score})


@dataclass
class OneCut(FlowCut):
    """All of the way to T `[M, T]` at one place, by the running score of the blocks so far."""

    def blocks(self, depth: int, tower: TowerInfo) -> range:
        return range(depth + 1)

    def blocks_left(self, depth: int, tower: TowerInfo) -> int:
        return 0


@dataclass
class TextCut(Pruner):
    """The cut in the decoder: ranks the visual tokens `[M, N]` as the last prompt token sees them in one layer."""

    name: ClassVar[str] = "flowcut_text"
    site: ClassVar[str] = "layer"
    default_scope: ClassVar[str] = "visual"

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        names = (LAST_VISUAL_ATTENTION, LAST_VALUE_SIMILARITY, DECODER_VALUE_NORM)
        return tuple(Signal(name, depth - 1) for name in names)

    def score(self, view: View) -> Tensor:
        layer = view.depth - 1
        seen = _to_one(view.signal(LAST_VISUAL_ATTENTION, layer)) + _to_one(view.signal(LAST_VALUE_SIMILARITY, layer))
        return seen * view.signal(DECODER_VALUE_NORM, layer)


def _to_one(values: Tensor) -> Tensor:
    """Rows `[M, N]` brought to sum 1; even ones where there is nothing but zeros. NaN stays, to be refused."""
    total = values.sum(dim=1, keepdim=True)
    return torch.where(total == 0, 1 / values.shape[1], values / total)
