"""Attention rows of one layer, some at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenprune.engine.query_rows import seen_keys
from tokenprune.evals.diagnose.attention_tap import Call

BLOCK = 1 << 20
"""Weights at a time, of all samples and heads: 4 MB, whatever the length. One row is the least."""


def row_blocks(call: Call) -> Iterator[tuple[int, Tensor]]:
    """The first row of each block and its weights `[B, H, r, K]` fp32; a row that sees nothing is zeros."""
    query, key = call.query, call.key
    batch, heads, length, _ = query.shape
    key_heads, count = key.shape[1:3]
    keys = key.float().transpose(2, 3)  # [B, Hk, d, K]
    size = max(1, BLOCK // (batch * heads * count))
    for start in range(0, length, size):
        part = query[:, :, start : start + size].float() * call.scale
        rows = part.shape[2]
        grouped = part.unflatten(1, (key_heads, -1)).flatten(2, 3)  # query heads of a key head are more rows of it
        logits = torch.matmul(grouped, keys).unflatten(2, (-1, rows)).flatten(1, 2)  # [B, H, r, K]
        seen = seen_rows(call, start, start + rows)
        if seen is None:
            yield start, logits.softmax(dim=-1)
            continue
        weights = logits.masked_fill_(~seen[:, None], float("-inf")).softmax(dim=-1)
        # padding sees no key
        yield start, weights.masked_fill_(~seen.any(-1)[:, None, :, None], 0.0)


def seen_rows(call: Call, start: int, stop: int) -> Tensor | None:
    """`[B or 1, r, K]` bool, which keys the rows `start..stop` see; None where that is all."""
    mask, length = call.mask, call.query.shape[2]
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return seen_keys(mask[:, :, start:stop], None, stop - start, call.key, call.window)
    if mask is None and length == 1:
        return seen_keys(mask, None, 1, call.key, call.window)
    rows = torch.arange(start, stop, device=call.key.device)[None]
    return seen_keys(mask, rows, length, call.key, call.window)
