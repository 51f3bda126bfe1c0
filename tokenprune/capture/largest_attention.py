"""What some rows attend to tokens in the head that attends most (FitPrune)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_CHUNK = 128  # query rows at a time: memory stays O(rows x keys)


def largest_attention(
    query: Tensor, key: Tensor, scale: float, rows: Tensor, columns: Tensor, allowed: Callable[[Tensor], Tensor]
) -> Tensor:
    """`[n]` fp32, sum over the rows of the largest attention of any head to each column.

    Args:
        query: `[H, P, d]`.
        key: `[Hk, K, d]`.
        scale: of the products.
        rows: `[R]` int64, places among the queries.
        columns: `[n]` int64, places among the keys.
        allowed: from rows `[r]` to `[r, K]` bool, which keys they see.
    """
    groups = query.shape[0] // key.shape[0]
    columns_of = key.float()[:, None].transpose(2, 3)  # [Hk, 1, d, K]
    total = torch.zeros(columns.shape[0], device=query.device)
    for asking in rows.split(_CHUNK):
        asked = query[:, asking].float().unflatten(0, (-1, groups))  # [Hk, G, r, d]
        products = (asked @ columns_of) * scale  # [Hk, G, r, K]
        mass = products.masked_fill(~allowed(asking), -torch.inf).softmax(dim=-1)[..., columns]
        total += mass.flatten(0, 1).amax(dim=0).sum(dim=0)
    return total
