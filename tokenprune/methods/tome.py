"""Merges tokens that are alike by bipartite matching, block by block inside the vision tower (ToMe).

Paper: "Token Merging: Your ViT But Faster", Bolya et al., ICLR 2023, https://arxiv.org/abs/2210.09461; a baseline in
the tables of many papers on visual tokens.
Official code: facebookresearch/ToMe; not read for this file, which was written from the card's formulas.
Licence: CC BY-NC 4.0 upstream; no code was copied.

After a block, of the tokens that are left, in raster order: every other one from the first on is in A, the others in B.
The metric is the keys of that block, mean over heads. Each token of A finds the one of B with the largest cosine; the r
pairs that are most alike are merged into the B token's place, as the mean weighed by how many patches each stands for.
[CLS] takes no part.

    pair of i = argmax_{j in B} cos(k_i, k_j)
    x_j' = (n_i x_i + n_j x_j) / (n_i + n_j),  n_j' = n_i + n_j

Where (tables mostly do not say, and differ by five points of GQA: 54.3 and 59.5 at 192 tokens of LLaVA-1.5):
- By itself, in the tower: after each block before the one that makes the visual tokens, r alike in all of them up to
  rounding and such that the budget is met exactly there (code: r is a constant and the count follows).
- `at="input"`: once, on the embeddings that the LLM would get, by the keys of the block that makes them.
- `at="vision:L"`: once, after that block.

Deviations:
- Merging comes behind a block, not between its attention and its MLP (our choice: the tower's own code runs as it is).
- Tokens stay in raster order; the code puts those of B behind those of A, so that its later halves are others.
- A and B are halves of the patches alone; the code counts [CLS], so that its A begins with the second patch.
- A block in which more than all of A would have to go matches again what is left, by means of the keys (our choice).
- Proportional attention inside the tower (log size on its keys) is left out: the tower's attention has no place for it
  yet. In the decoder it is `key_bias`, off unless asked for.
- Pictures (crops, frames) are merged each alone, with their share of the budget.
- Ties go to the lower raster index.
- Towers whose visual tokens are groups of patches (Qwen, InternVL, SmolVLM) take no merged states; `at="input"` works.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths, Pruner, Stage
from tokenprune.interfaces.selection import Selection, refuse_nan
from tokenprune.interfaces.signals import TOWER_KEYS, Signal, TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.interfaces.visual import Visual
from tokenprune.kernels.merge import merge
from tokenprune.registry import register_method

_SIZES = "tome_sizes"
_TINY = 1e-12


def merged_pairs(metric: Tensor, count: int) -> Tensor:
    """Which token each one goes to where the `count` pairs that are most alike are merged.

    Args:
        metric: `[M, N, d]` fp32.
        count: r, at most the number of tokens in A, (N + 1) // 2, and N at least 2.

    Returns:
        `[M, N]` int64: its own place for a token that stays.
    """
    unit = metric / torch.linalg.vector_norm(metric, dim=2, keepdim=True).clamp_min(_TINY)
    first, second = unit[:, ::2], unit[:, 1::2]
    alike = torch.stack([a @ b.T for a, b in zip(first, second)])  # [M, |A|, |B|]
    best = alike.amax(dim=2, keepdim=True)
    at = torch.arange(alike.shape[2], device=alike.device)
    partner = torch.where(alike == best, at, alike.shape[2]).amin(dim=2)  # [M, |A|], the lowest of equals
    order = best.squeeze(2).argsort(dim=1, descending=True, stable=True)[:, :count]
    target = torch.arange(metric.shape[1], device=metric.device).repeat(len(metric), 1)
    return target.scatter(1, 2 * order, 2 * partner.gather(1, order) + 1)


class BlockBudget(Budget):
    """What is left after step `step` of `steps`, the last of which leaves `keep`."""

    def __init__(self, keep: int | float, step: int, steps: int) -> None:
        super().__init__(keep)
        self.step, self.steps = step, steps

    def _left(self, before: int, after: int) -> int:
        return before - round((before - after) * self.step / self.steps)

    def tokens(self, num_tokens: int) -> int:
        return self._left(num_tokens, super().tokens(num_tokens))

    def pictures(self, visual: Visual) -> list[int]:
        sizes = [rows * cols for rows, cols in visual.tower_grids]
        last = Budget(self.keep).pictures(visual)
        return [self._left(size, max(kept, 1)) for size, kept in zip(sizes, last)]


@register_method("tome")
@dataclass
class ToMe(Pruner):
    """Merges the patches `[M, N, D]` of a picture down to its budget, block by block in the vision tower.

    It has no options of its own.
    """

    site: ClassVar[str] = "vision"
    merges: ClassVar[bool] = True
    published: ClassVar[str] = "arXiv 2210.09461, facebookresearch/ToMe"
    reproduces: ClassVar[str] = "LLaVA-1.5-7B, 192 tokens: GQA 54.3 or 59.5, by table (baselines card, section 13)"

    def stages(self, budget: Budget, depths: ModelDepths) -> tuple[Stage, ...]:
        blocks = 1 if depths.feature is None else max(depths.feature, 1)  # the plan's own check refuses the rest
        return tuple(
            Stage(f"vision:{block}", self, BlockBudget(budget.keep, block + 1, blocks)) for block in range(blocks)
        )

    def stage_at(self, site: str, budget: Budget) -> Stage:
        return Stage(site, OneMerge(**{part.name: getattr(self, part.name) for part in fields(ToMe)}), budget)

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        if place not in ("vision", "input"):
            raise ValueError(
                f"tome matches tokens by keys of the vision tower, so it acts at 'vision:L' and 'input', not at "
                f"{place!r}."
            )
        return (Signal(TOWER_KEYS, depth if place == "vision" else tower.feature_layer),)

    def select(self, view: View) -> Selection:
        (signal,) = self.signals_at(view.tower, view.site.partition(":")[0], view.depth)
        keys = view.signal(signal.name, signal.layer)
        refuse_nan(keys)
        refuse_nan(view.features)
        metric = keys.unflatten(2, (view.tower.num_heads, -1)).mean(dim=2)  # [M, N, d]
        images, num_tokens = metric.shape[:2]
        before = view.carry.get(_SIZES, torch.ones(images, num_tokens, device=metric.device)).float()
        places = torch.arange(num_tokens, device=metric.device).expand(images, -1)
        states, sizes = view.features.float(), before
        while places.shape[1] > view.budget:
            there = places.shape[1]
            target = merged_pairs(metric, min(there - view.budget, (there + 1) // 2))
            stays = target == torch.arange(there, device=target.device)
            left = max(view.budget, there // 2)
            kept = stays.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :left]
            states, metric = (_at(merge(part, target, there, sizes), kept) for part in (states, metric))
            sizes = torch.zeros_like(sizes).scatter_add(1, target, sizes).gather(1, kept)
            places = places.gather(1, kept)
        own = before.gather(1, places)
        # a token that nothing was merged into goes on bit for bit
        same = (sizes == own)[..., None]
        features = torch.where(same, _at(view.features, places), states.to(view.features.dtype))
        carry = {_SIZES: before.scatter(1, places, sizes)}
        merged = torch.full((images,), num_tokens - view.budget, device=places.device)
        return Selection(places, features, carry=carry, sizes=sizes / own, merged=merged)

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        products, there = 0, num_tokens
        while there > keep:
            products += ((there + 1) // 2) * (there // 2)
            there = max(keep, there // 2)
        return 2 * num_images * products * (tower.hidden_size // tower.num_heads)


@dataclass
class OneMerge(ToMe):
    """The one merge of ToMe at a site that the user named."""

    name: ClassVar[str] = "tome"


def _at(values: Tensor, places: Tensor) -> Tensor:
    """Of `[M, N, D]`, those at `places` `[M, k]`."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[2]))
