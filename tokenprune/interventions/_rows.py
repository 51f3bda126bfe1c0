"""Attention of some rows with its logits in the open, a block of rows at a time: never keys x keys at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.interfaces.intervention import Attended

BLOCK = 64  # rows at a time


def blocks(rows: int) -> Iterator[slice]:
    """Slices of `BLOCK` rows."""
    for start in range(0, rows, BLOCK):
        yield slice(start, min(start + BLOCK, rows))


def logits(given: Attended, part: slice) -> Tensor:
    """`[B, H, r, K]` fp32 of the rows in `part`: scaled, and the least number at keys that a row does not see."""
    query = given.query[:, :, part]
    batch, heads, rows, width = query.shape
    key_heads, count = given.key.shape[1:3]
    # the query heads of one key head become more rows of it, so no key is copied
    grouped = query.reshape(batch * key_heads, heads // key_heads * rows, width)
    keys = given.key.reshape(batch * key_heads, count, width).transpose(1, 2)
    scores = torch.baddbmm(query.new_empty(1, 1, 1), grouped, keys, beta=0, alpha=given.scale).float()
    scores = scores.view(batch, heads, rows, count)
    if given.allowed is None:
        return scores
    return scores.masked_fill(~given.allowed[:, None, part], torch.finfo(scores.dtype).min)


def mixed(weights: Tensor, value: Tensor) -> Tensor:
    """`[B, H, r, d]`: the values `[B, Hk, K, d]` in the shares `[B, H, r, K]`."""
    batch, heads, rows, count = weights.shape
    key_heads, width = value.shape[1], value.shape[3]
    grouped = weights.reshape(batch * key_heads, heads // key_heads * rows, count).to(value.dtype)
    values = value.reshape(batch * key_heads, count, width)
    return torch.bmm(grouped, values).view(batch, heads, rows, width)


def in_the_open(given: Attended, change: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """`[B, H, R, d]`: attention with the weights that `change` makes of each block's logits, see `logits`."""
    parts = [mixed(change(logits(given, part), part), given.value) for part in blocks(given.query.shape[2])]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def writable(values: Tensor) -> Tensor:
    """The same numbers where they may be written over: a copy where they are needed for gradients."""
    return values.clone() if values.requires_grad else values


def of_heads(given: Attended, heads: Sequence[int]) -> Attended:
    """The same of some query heads, each with a key head of its own."""
    group = given.query.shape[1] // given.key.shape[1]
    keys = [head // group for head in heads]
    return replace(given, query=given.query[:, list(heads)], key=given.key[:, keys], value=given.value[:, keys])


def check_heads(heads: Any, count: int | None = None) -> None:
    """Raise ValueError unless `heads` is None or a list of query heads, below `count`."""
    if heads is None:
        return
    listed: list[Any] = list(heads) if isinstance(heads, (list, tuple)) else [None]
    if any(type(head) is not int or head < 0 for head in listed):
        raise ValueError(f"heads must be a list of query heads from 0 on, got {heads!r}.")
    if count is not None and any(head >= count for head in listed):
        raise ValueError(f"heads name {max(listed)}, and this decoder has query heads 0 to {count - 1}.")
