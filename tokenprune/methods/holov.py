"""Gives every strip of the image its share of the budget, by attention, and keeps the best tokens of each (HoloV).

Paper: "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention", Zou et al.,
NeurIPS 2025, https://arxiv.org/abs/2510.02912.
Official code: obananas/HoloV at 1d2e65e (24 Jan 2026).
Licence: Apache-2.0 upstream; this file was written from the formulas, no code was copied.

The raster sequence of N tokens is cut into C consecutive strips ("crops", code) whose sizes differ by at most one. In
a strip of m embeddings, z normalised, S = z z^T with a zero diagonal, mu_i = sum_j S_ij / (m - 1) and the variance is
V_i = sum_j (S_ij - mu_i)^2 / (m - 1), where j runs over the zeroed diagonal too (code). With A the [CLS] attention of
the block that gives the features (code), head-mean, the holistic score is H = A + gamma V, with gamma = mean A / mean V
in the strip. Strips get quotas in proportion to (mean H)^power, and each keeps its best tokens.

    H_i = A_i + gamma V_i,  gamma = mean A / mean V
    quota_c = k (mean H_c)^power / sum_c (mean H_c)^power

| | variant="paper" | variant="official" |
|---|---|---|
| strips | [1024 / k]; rounded to the nearest, our choice | 16 (LLaVA, hard-coded beside a budget of 64) |
| strips without [CLS] | the same | int(1024 / 576 * N / k) (Qwen2.5-VL port) |
| H | A + gamma V | 1000 A + 0.09 gamma V |
| rest of rounded-down quotas | to the strip with the highest weight | one each to the strips with the highest weights |
| best in the strip | highest H | highest A: the variance is not used |
| quota above the strip's size | passed on in proportion to weight * (size - quota), repeatedly | lost |
| a strip of one token | not said; see below | weight from A without the factor 1000 |

The default is "official", because only the code is fully specified: the paper leaves rounding, layer and power open.
Which of the two the published tables come from is unverified.

Since gamma rescales V to the strip's mean attention, mean H is the same multiple of mean A in every strip: the variance
has no say in the quotas of either variant. It matters only for the choice inside the strips of "paper".

Deviations, in both variants:
- A budget in percent is rounded to the nearest token; the Qwen2.5-VL port rounds it down.
- Exactly k tokens stay. Quota above a strip's size is passed on in "official" too, where the code keeps fewer tokens
  and fills up with all-zero embeddings. How the paper rounds is unspecified: shares are rounded down, for at most four
  rounds, and what is left goes to the strips with room by weight (our choice).
- Kept tokens stand in raster order; the official code leaves them in descending attention inside a strip.
- No attention at all gives equal quotas (our choice). A strip without variance (one token, or equal ones) counts
  gamma V as mean A in "paper", so that it weighs as much as its attention says (our choice).
- Quotas are computed in fp64. Shares less than 1e-4 below a whole number count as whole, so that even attention gives
  even quotas; in the code the epsilons let them fall to the next lower one (our choice).
- Ties go to the lower raster index and the earlier strip.
- Images, thumbnails, mosaics of crops and frames are selected each on its own, with their share of the budget; the
  official code cuts the joined sequence of a LLaVA-NeXT image's thumbnail and mosaic into strips.
- Towers without [CLS]: the attention that a patch gets from all patches in the block that gives the features, mean
  over heads and over the patches of a token (Qwen2.5-VL port; on other towers an extension of ours, labelled in
  reports). The port leaves these scores in the order of the tower's windows beside tokens in raster order, and lets
  the token before the picture compete in place of its last one; here every score is its own token's.
- Visual context refetching (paper, appendix) is left out: it is not in the official code, and its layer, threshold and
  strength are not given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection
from tokenprune.interfaces.signals import Signal, TowerInfo, summary_attention
from tokenprune.interfaces.view import View
from tokenprune.kernels.segmented_topk import segmented_topk
from tokenprune.registry import register_method

VARIANTS = ("paper", "official")

_EPS = 1e-6
_ATTENTION_SCALE = 1000.0  # official
_VARIANCE_WEIGHT = 0.09  # official
_PAPER_BUDGET = 1024  # paper: budget times strips
_OFFICIAL_STRIPS = 16
_OFFICIAL_TOKENS = 576  # of LLaVA-1.5, to which the port without [CLS] scales the paper's budget
_SLACK = 1e-4  # of a token: shares that are whole up to rounding, or up to the code's epsilons, count as whole
_LARGE_STRIP = 1 << 18  # numbers: 1 MB in fp32, below which one product for all strips is as fast
_ROUNDS = 4  # of passing quota on in proportion, before the rest goes by weight


def strip_sizes(num_tokens: int, strips: int) -> list[int]:
    """Sizes of `strips` consecutive strips of a sequence, the longer ones first; empty ones are left out."""
    base, longer = divmod(num_tokens, strips)
    return [base + 1] * longer + [base] * (strips - longer if base else 0)


def similarity_variance(features: Tensor) -> Tensor:
    """V: how much a token's similarities to the other tokens of its strip vary.

    Args:
        features: `[..., m, D]` embeddings of one strip, or `[..., C, m, D]` of several, any float dtype.

    Returns:
        `[..., m]` fp32; zeros for a strip of one token.
    """
    several = features.dim() > 2 and features.device.type == "cpu"
    if several and features.numel() >= _LARGE_STRIP * features.shape[-3]:
        # one strip after another: a normalised copy of all of them would not stay in the cache
        return torch.stack([_strip_variance(strip) for strip in features.unbind(-3)], dim=-2)
    return _strip_variance(features)


def _strip_variance(features: Tensor) -> Tensor:
    unit = features.float()
    unit = unit / (torch.linalg.vector_norm(unit, dim=-1, keepdim=True) + _EPS)
    similar = unit @ unit.transpose(-1, -2)  # [..., m, m]
    similar.diagonal(dim1=-2, dim2=-1).zero_()
    others = max(features.shape[-2] - 1, 1)
    mean = similar.sum(dim=-1, keepdim=True) / others  # [..., m, 1]
    return (similar - mean).square().sum(dim=-1) / others


def give(quota: Tensor, size: Tensor, order: Tensor, amount: Tensor) -> Tensor:
    """Quotas after `amount` more tokens went to the strips in `order`, each filled before the next gets any.

    Args:
        quota: `[M, C]` int64.
        size: `[M, C]` int64, the most that a strip can take in.
        order: `[M, C]` int64, strips by rank.
        amount: `[M, 1]` int64.
    """
    room = (size - quota).gather(1, order)
    before = room.cumsum(dim=1) - room
    return quota.scatter_add(1, order, torch.minimum((amount - before).clamp_min(0), room))


def fit_quotas(weight: Tensor, quota: Tensor, size: Tensor, budget: int, one_each: bool) -> Tensor:
    """Quotas of at most a strip's size that sum to the budget; what is above the size passes to the other strips.

    Args:
        weight: `[M, C]` fp64, positive or zero.
        quota: `[M, C]` int64, the sum of a row is at most the budget.
        size: `[C]` int64, their sum is at least the budget.
        budget: k.
        one_each: what is left after rounding goes to the strips with the highest weights that have room, one each,
            before it fills them up in the same order.

    Returns:
        `[M, C]` int64; every row sums to the budget.
    """
    order = weight.argsort(dim=1, descending=True, stable=True)
    size = size.expand_as(quota)
    quota = torch.minimum(quota, size)
    for _ in range(_ROUNDS):
        left = budget - quota.sum(dim=1, keepdim=True)
        if left.device.type == "cpu" and not bool(left.any()):
            return quota
        share = weight * (size - quota)
        total = share.sum(dim=1, keepdim=True)
        share = left * share / torch.where(total > 0, total, 1)
        quota = torch.minimum(quota + (share + _SLACK).floor().long(), size)
    left = budget - quota.sum(dim=1, keepdim=True)
    if one_each:
        quota = give(quota, torch.minimum(quota + 1, size), order, left)
        left = budget - quota.sum(dim=1, keepdim=True)
    return give(quota, size, order, left)


@register_method("holov")
@dataclass
class HoloV(Pruner):
    """Splits the k tokens of an image over C strips of its raster sequence and keeps the best of every strip.

    Attributes:
        variant: "official" or "paper", see the table above.
        crops: C, how many strips, at least 1 and at most the number of tokens (more are cut to it). None is the
            variant's own, see the table above.
        power: exponent of the strips' weights (tau of the paper, which gives no value; 1 in the code). Higher ones
            sharpen the differences between strips.
    """

    published: ClassVar[str] = "arXiv 2510.02912, obananas/HoloV"
    reproduces: ClassVar[str] = (
        "LLaVA-1.5-7B at 64 of 576: GQA 55.3, POPE 80.3, TextVQA 55.4 (as copied in the SIEVE and DiffPrune papers); "
        "55.1, 76.8, 54.9 re-run in one environment (arXiv 2606.01711, Table 1)"
    )

    variant: str = "official"
    crops: int | None = None
    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}.")
        if self.crops is not None and (isinstance(self.crops, bool) or self.crops < 1):
            raise ValueError(f"crops must be None or at least 1, got {self.crops!r}.")
        if not 0 <= self.power < float("inf"):
            raise ValueError(f"power must be a number from 0 on, got {self.power!r}.")

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        return (summary_attention(tower, tower.feature_layer),)

    def notes(self, tower: TowerInfo) -> tuple[str, ...]:
        if tower.has_cls:
            return ()
        return ("no [CLS] in this tower: received attention, as the official Qwen2.5-VL port (elsewhere an extension)",)

    def strips(self, num_tokens: int, budget: int, has_cls: bool = True) -> list[int]:
        """Sizes of the strips that N tokens are cut into for this budget."""
        if self.crops is not None:
            crops = self.crops
        elif self.variant == "paper":
            crops = max(1, round(_PAPER_BUDGET / budget))
        elif has_cls:
            crops = _OFFICIAL_STRIPS
        else:
            crops = max(1, int(_PAPER_BUDGET / _OFFICIAL_TOKENS * num_tokens / budget))
        return strip_sizes(num_tokens, min(crops, num_tokens))

    def scores(self, features: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """H of each token and the mean of each strip, for strips of one size.

        Args:
            features: `[M, C, m, D]`.
            attention: `[M, C, m]` fp32.

        Returns:
            H `[M, C, m]` fp32 and its mean `[M, C]` fp64.
        """
        if self.variant == "official" and features.shape[2] == 1:
            return attention, attention.double().mean(dim=2)
        variance = similarity_variance(features)
        mean_variance = variance.double().mean(dim=2, keepdim=True)
        if self.variant == "official":
            attention = attention * _ATTENTION_SCALE
            mean_attention = attention.double().abs().mean(dim=2, keepdim=True)
            holistic = attention + _VARIANCE_WEIGHT * (mean_attention / (mean_variance + _EPS)) * variance
        else:
            mean_attention = attention.double().abs().mean(dim=2, keepdim=True)
            flat = mean_variance == 0  # false for NaN, which must stay to be seen
            scaled = variance / torch.where(flat, 1, mean_variance)
            holistic = attention + mean_attention * torch.where(flat, 1, scaled)
        return holistic.float(), holistic.mean(dim=2)

    def quotas(self, means: Tensor, size: Tensor, budget: int) -> Tensor:
        """How many tokens each strip keeps.

        Args:
            means: `[M, C]` fp64, mean H of the strips.
            size: `[C]` int64.
            budget: k.

        Returns:
            `[M, C]` int64; at most the sizes, every row sums to k.
        """
        official = self.variant == "official"
        raised = means.pow(self.power)
        total = raised.sum(dim=1, keepdim=True)
        weight = raised / (total + (_EPS if official else 0)).clamp_min(torch.finfo(total.dtype).tiny)
        weight = torch.where(total > 0, weight, 1 / means.shape[1])
        quota = (weight * budget + _SLACK).floor().long()
        left = budget - quota.sum(dim=1, keepdim=True)
        order = weight.argsort(dim=1, descending=True, stable=True)
        limit = quota + 1 if official else torch.full_like(quota, budget)
        return fit_quotas(weight, give(quota, limit, order, left), size, budget, one_each=official)

    def select(self, view: View) -> Selection:
        num_tokens, budget = view.num_tokens, view.budget
        sizes = self.strips(num_tokens, budget, view.tower.has_cls)
        (wanted,) = self.signals(view.tower)
        attention = view.signal(wanted.name, wanted.layer, *wanted.settings).float()
        # at most two sizes occur: strips of one size are one batch
        groups = [(m, sizes.count(m)) for m in sorted(set(sizes), reverse=True)]
        holistic, means, start = [], [], 0
        for m, count in groups:
            part = slice(start, start + m * count)
            h, mean = self.scores(
                view.features[:, part].unflatten(1, (count, m)), attention[:, part].unflatten(1, (count, m))
            )
            holistic.append(h.flatten(1))
            means.append(mean)
            start += m * count
        score = torch.cat(holistic, dim=1)  # [M, N]
        if score.device.type == "cpu" and bool(score.isnan().any()):
            raise ValueError("Scores hold NaN, so they rank nothing. Check the model's weights and its input for NaN.")
        device = score.device
        size = torch.cat([torch.full((count,), m, device=device) for m, count in groups])  # [C]
        quota = self.quotas(torch.cat(means, dim=1), size, budget)  # [M, C]
        ranked = attention if self.variant == "official" else score
        return Selection(segmented_topk(ranked, sizes, quota, budget))

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        official = self.variant == "official"
        pairs = sum(m * m for m in self.strips(num_tokens, keep, tower.has_cls) if not (official and m == 1))
        return 2 * num_images * width * pairs
