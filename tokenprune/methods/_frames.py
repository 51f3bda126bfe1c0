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


def in_frames(view: View) -> Tensor:
    """`[M, F, P]` int64: which of the N tokens stands at each place of each raster, P the size of the largest; -1 where
    none does."""
    largest, count = max(raster.num_tokens for raster in view.rasters), len(view.rasters)
    tokens = torch.arange(view.num_tokens, device=view.features.device).expand(view.num_images, -1)
    shape = (view.num_images, count, largest)
    if view.tokens is None and count * largest == view.num_tokens:
        return tokens.view(shape)
    numbers = raster_numbers(view)
    starts = torch.tensor([raster.start for raster in view.rasters]).to(numbers.device)
    place = (tokens if view.tokens is None else view.tokens.to(numbers.device)) - starts[numbers]
    standing = torch.full((view.num_images, count * largest), -1, device=numbers.device)
    return standing.scatter(1, numbers * largest + place, tokens).view(shape)


def counts_by_size(sizes: Tensor, largest: int, budget: int) -> Tensor:
    """How many of each group, so that the counts are nearest to equal shares of the groups (Webster's rounding) and add
    up to the budget, or to all there are; one of each first, where the budget has room for that.

    Args:
        sizes: `[M, G]` int64, how many tokens each group has.
        largest: no group has more.
        budget: k.

    Returns:
        `[M, G]` int64; ties go to the lower group.
    """
    place = torch.arange(largest, device=sizes.device)
    turn = (place + 0.5).double() / sizes.double().clamp_min(1)[..., None]  # [M, G, largest]
    has_room = budget >= (sizes > 0).sum(dim=1)
    turn = turn.masked_fill((place == 0) & has_room[:, None, None], -1.0)
    turn = turn.masked_fill(place >= sizes[..., None], torch.inf).flatten(1)
    order = turn.sort(dim=1, stable=True)
    taken = order.values[:, :budget].isfinite().long()
    return torch.zeros_like(sizes).scatter_add(1, order.indices[:, :budget] // largest, taken)


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
