"""The text tokens that rate visual tokens, and how they attend to them (SparseVLM)."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 128  # query rows at a time


def text_raters(visual: Tensor, text: Tensor) -> Tensor:
    """`[T]` bool: which text tokens `[T, D]` are nearer to the visual tokens `[N, D]` than the mean of the text; all
    where none is."""
    share = (visual.float() @ text.float().T).softmax(dim=1).mean(dim=0)  # [T]
    raters = share > share.mean()
    return raters | ~raters.any()


def rated(
    query: Tensor,
    key: Tensor,
    scale: float,
    allowed: Tensor,
    columns: Tensor,
    turned: Tensor | None,
    raters: Tensor,
    heads: int,
) -> Tensor:
    """`[n]` fp32, mean over raters and over the heads in which they attend most to the columns.

    Args:
        query: `[H, T, d]` of the text.
        key: `[Hk, K, d]`.
        scale: of the products.
        allowed: `[T, K]` bool, which keys a row sees.
        columns: `[n]` int64, the visual tokens among the keys.
        turned: `[T, n]`, what the attention to each column is divided by; None: nothing.
        raters: `[T]` bool.
        heads: how many heads count, all where there are fewer; 0 means 14, or half of fewer than 28, and -1 all.
    """
    groups = query.shape[0] // key.shape[0]
    total = torch.zeros(query.shape[0], columns.shape[0], device=query.device)  # [H, n]
    for start in range(0, query.shape[1], _CHUNK):
        rows = slice(start, start + _CHUNK)
        asked = query[:, rows].float().unflatten(0, (-1, groups))  # [Hk, G, R, d]
        products = (asked @ key.float()[:, None].transpose(2, 3)) * scale  # [Hk, G, R, K]
        mass = products.masked_fill(~allowed[rows], -torch.inf).softmax(dim=-1)[..., columns]
        mass = mass if turned is None else mass / turned[rows]
        total += (mass * raters[rows, None]).sum(dim=2).flatten(0, 1)
    if heads < 0:
        return total.mean(dim=0) / raters.sum()
    heads = heads or min(14, max(1, query.shape[0] // 2))
    best = total.sum(dim=1).argsort(descending=True, stable=True)[: min(heads, query.shape[0])]
    return total[best].mean(dim=0) / raters.sum()
