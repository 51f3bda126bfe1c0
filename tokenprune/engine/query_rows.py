"""Query rows of an attention call: picked out, put back, and which keys they see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def take(values: Tensor, rows: Tensor, dim: int) -> Tensor:
    """Of `[B, ...]`, the places `[B, R]` along `dim`."""
    shape = [1] * values.dim()
    shape[0], shape[dim] = rows.shape
    wide = list(values.shape)
    wide[dim] = rows.shape[1]
    return values.gather(dim, rows.view(shape).expand(wide))


def along(values: Tensor, rows: Tensor, dim: int) -> Tensor:
    """Of `[..., 1 or B, P]` or `[..., 1 or B, P, d]` the places `[B, R]`."""
    rows = rows.to(values.device)
    if dim == -1:
        values = values.expand(*values.shape[:-2], rows.shape[0], -1)
        return values.gather(-1, rows.expand(*values.shape[:-2], *rows.shape))
    values = values.expand(*values.shape[:-3], rows.shape[0], -1, -1)
    return values.gather(-2, rows[..., None].expand(*values.shape[:-3], *rows.shape, values.shape[-1]))


def put(output: Tensor, rows: Tensor, real: Tensor, changed: Tensor) -> Tensor:
    """`output` `[B, S, H, d]` with `changed` `[B, R, H, d]` at `rows` where `real`."""
    # a spare last row takes what stands for no row, so that no place is written twice
    length = output.shape[1]
    spare = torch.cat([output, output[:, :1]], dim=1)
    index = torch.where(real, rows, length)[..., None, None].expand_as(changed)
    return spare.scatter(1, index, changed.to(output.dtype))[:, :length]


def seen_keys(mask: Any, rows: Tensor | None, queries: int, key: Tensor, window: int | None) -> Tensor | None:
    """`[B or 1, R, K]` bool: which keys the rows `[B, R]` (None: all `queries`) see; None where that is all."""
    count, device = key.shape[2], key.device
    if isinstance(mask, Tensor) and mask.dim() == 4:
        seen = mask[:, 0, :, :count]
        seen = seen if seen.dtype == torch.bool else seen >= 0
        if rows is None:
            return seen
        seen = seen.expand(rows.shape[0], -1, -1)
        return take(seen, rows, 1)
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise ValueError(
            f"A layer was given a {type(mask).__name__} for a mask; interventions work with SDPA, eager and flash "
            "attention only. Load the model with attn_implementation='sdpa'."
        )
    if mask is None and queries == 1 and window is None:
        return None
    query_rows = torch.arange(queries, device=device)[None] if rows is None else rows
    at = torch.arange(count, device=device)
    last = query_rows[..., None] + (count - queries)
    seen = at <= last
    if window is not None:  # flash attention is told so beside the mask
        seen = seen & (at > last - window)
    return seen if mask is None else seen & mask[:, None, :count].to(torch.bool)
