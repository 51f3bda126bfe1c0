"""Attention of a few query rows over all keys, as head-mean scores: what [CLS], last-token and instruction rows cost.

Only the rows that a method asked for are formed, so memory is rows x keys and never keys x keys, and grouped-query
attention reads each key head once instead of repeating it for every query head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_rows(query: Tensor, key: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of each query row over all keys, in fp32, averaged over the heads.

    Costs 2 B H R N d floating-point operations and one read of `key`.

    Args:
        query: `[B, H, R, d]`, any float dtype, any strides.
        key: `[B, Hk, N, d]`, any float dtype, any strides; H is a multiple of Hk and query head h reads key head
            h // (H / Hk), the order of grouped-query attention in Hugging Face models.
        scale: what the dot products are multiplied by, usually 1 / sqrt(d).
        mask: `[B, R, N]` bool, True where a row sees a key; each row must see one at least. None: every row sees all.

    Returns:
        `[B, R, N]` fp32; every row sums to 1, with zeros at keys that it does not see.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            f"attention_rows needs query [B, H, R, d] and key [B, Hk, N, d], got {tuple(query.shape)} "
            f"and {tuple(key.shape)}."
        )
    batch, heads, rows, width = query.shape
    key_batch, key_heads, count, key_width = key.shape
    if batch != key_batch or width != key_width or key_heads == 0 or heads % key_heads:
        raise ValueError(
            f"Query {tuple(query.shape)} and key {tuple(key.shape)} do not fit: batch and width must agree and the "
            "query heads must be a multiple of the key heads."
        )
    # the query heads of one key head become more rows of it, so no key is copied
    grouped = (query.float() * scale).reshape(batch, key_heads, heads // key_heads * rows, width)
    logits = torch.matmul(grouped, key.float().transpose(2, 3))
    if mask is None:
        return logits.softmax(dim=-1).view(batch, heads, rows, count).mean(dim=1)
    logits = logits.view(batch, heads, rows, count).masked_fill(~mask[:, None], float("-inf"))
    return logits.softmax(dim=-1).mean(dim=1)
