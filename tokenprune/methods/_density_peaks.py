"""Density-peak clustering of states by their nearest neighbours: every cluster has a centre, nothing is random."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.interfaces.selection import topk_indices


def distances(states: Tensor) -> Tensor:
    """`[M, m, m]` fp32: L2 distances of states `[M, m, D]` over the root of D."""
    states = states.float()
    # products of matrices would lose what small distances say
    return torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist") * states.shape[2] ** -0.5


def reach(distance: Tensor, density: Tensor, together: Tensor | None = None) -> Tensor:
    """`[M, m]`: how far each token is from the nearest denser one, see `density_peaks`.

    Args:
        distance: `[M, m, m]`.
        density: `[M, m]`.
        together: `[M, m, m]` bool, which tokens are of one set, where several are looked at at once; None: all.
    """
    at = torch.arange(density.shape[1], device=density.device)
    other, own = density[:, None], density[..., None]
    denser = (other > own) | ((other == own) & (at[None] < at[:, None]))  # [M, m, m], of the last dimension
    if together is None:
        farthest = distance.amax(dim=(1, 2), keepdim=True)
    else:
        denser = denser & together
        of_token = distance.masked_fill(~together, 0).amax(dim=2)
        farthest = torch.where(together, of_token[:, None], 0).amax(dim=2, keepdim=True)
    return torch.where(denser, distance, farthest).amin(dim=2)


def density_peaks(states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Centres are those of high density that are far from all denser ones; the others go to the nearest centre.

    The distance is L2 over the root of the width. Density is exp of minus the mean squared distance to the `count`
    nearest, the token itself among them; of equal densities the earlier token counts as the denser one. A token's
    reach is its distance to the nearest denser one, and of the densest the largest distance between any two. Centres
    have the largest product of density and reach. Ties go to the earlier token and the earlier centre.

    Args:
        states: `[M, m, D]`.
        count: c, 1 <= c <= m.

    Returns:
        `[M, c]` int64, the centres, increasing; and `[M, m]` int64, the cluster of each token.
    """
    distance = distances(states)
    density = (-distance.square().topk(count, dim=2, largest=False).values.mean(dim=2)).exp()  # [M, m]
    centres = topk_indices(density * reach(distance, density), count)
    to_centre = distance.gather(2, centres[:, None].expand(-1, states.shape[1], -1))  # [M, m, c]
    number = torch.arange(count, device=states.device)
    nearest = torch.where(to_centre == to_centre.amin(dim=2, keepdim=True), number, count).amin(dim=2)
    # a centre may lie where an earlier one does
    return centres, nearest.scatter(1, centres, number.expand_as(centres))
