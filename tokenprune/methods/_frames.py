"""What methods for videos share: frames of a view, and a budget dealt out to them."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.interfaces.view import View


def raster_numbers(view: View) -> Tensor:
    """`[M, N]` int64, which raster (frame, crop) each token stands in."""
    sizes = torch.tensor([raster.num_tokens for raster in view.rasters])  # on the host, so that no length is read back
    numbers = torch.arange(len(view.rasters)).repeat_interleave(sizes).to(view.features.device)
    if view.tokens is None:
        return numbers.expand(view.num_images, -1)
    return numbers[view.tokens.to(numbers.device)]


def deal(scores: Tensor, group_of: Tensor, shares: Tensor, budget: int) -> Tensor:
    """The tokens with the highest scores of each group, so many of each that the counts are nearest to the shares
    (Webster's rounding) and add up to the budget; one of each first, where the budget has room for that.

    Args:
        scores: `[M, N]` fp32.
        group_of: `[M, N]` int64, group of each token, below G.
        shares: `[M, G]` fp32 from 0 on, what each group should have, to any scale.
        budget: k.

    Returns:
        `[M, k]` int64, increasing; ties go to the lower index.
    """
    images, count = scores.shape
    groups = shares.shape[1]
    order = scores.sort(dim=1, descending=True, stable=True).indices
    by_group = group_of.gather(1, order).sort(dim=1, stable=True)
    order = order.gather(1, by_group.indices)  # [M, N] by group, the highest first
    sizes = torch.zeros(images, groups, dtype=torch.int64, device=order.device)
    sizes = sizes.scatter_add(1, group_of, torch.ones_like(group_of))
    start = sizes.cumsum(1) - sizes
    place = torch.arange(count, device=order.device) - start.gather(1, by_group.values)  # [M, N] within the group
    # the j-th token of a group comes when (j + 1/2) / share is reached
    turn = (place + 0.5).double() / shares.double().clamp_min(1e-12).gather(1, by_group.values)
    has_room = budget >= (sizes > 0).sum(dim=1, keepdim=True)  # groups that an earlier cut emptied want none
    turn = turn.masked_fill((place == 0) & has_room, -1.0)
    first = turn.sort(dim=1, stable=True).indices[:, :budget]
    return order.gather(1, first).sort(dim=1).values
