"""Signals of the vision tower, from the queries, keys and values of a block, and those of the pixels themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune.interfaces.signals import (
    ATTENTION_BY_HEAD,
    CLS_ATTENTION,
    CLS_PATCH_ATTENTION,
    CLS_PATCH_SIMILARITY,
    CLS_VALUE_SIMILARITY,
    CLS_WIDE_ATTENTION,
    MEAN_QUERY_ATTENTION,
    MEAN_VALUE_SIMILARITY,
    SINK_ATTENTION,
    SINK_ATTENTION_SUM,
    TOWER_KEYS,
    Signal,
)
from tokenprune.kernels.attention_received import attention_received
from tokenprune.kernels.attention_rows import attention_rows

_CHUNK = 128  # query rows at a time: memory stays O(rows x keys)


def vision_signal(signal: Signal, query: Tensor, key: Tensor, value: Tensor, before: int) -> tuple[Tensor, int]:
    """One signal of m pictures, `[m, patches]` fp32 (`[m, patches, C]` for vectors), and how many products of a query
    with a key it took of each.

    Args:
        query, key, value: `[m, H, T, d]`, T = `before` [CLS] tokens and the patches.
    """
    name, tokens, patches = signal.name, key.shape[2], key.shape[2] - before
    scale = query.shape[-1] ** -0.5
    if name == CLS_ATTENTION:
        return attention_rows(query[:, :, :1], key, scale)[:, 0, before:], tokens  # [m, 1, T] -> [m, N]
    if name == CLS_WIDE_ATTENTION:
        wide, keys = (part.transpose(1, 2).flatten(2)[:, None] for part in (query[:, :, :1], key))  # [m, 1, T, H d]
        return attention_rows(wide, keys, wide.shape[-1] ** -0.5)[:, 0, before:], tokens
    if name == MEAN_QUERY_ATTENTION:
        mean = query[:, :, before:].float().mean(dim=2, keepdim=True)  # [m, H, 1, d]
        return attention_rows(mean, key, scale)[:, 0, before:], tokens
    if name == CLS_VALUE_SIMILARITY:
        return attention_rows(value[:, :, :1], value, 1.0)[:, 0, before:], tokens
    if name == CLS_PATCH_ATTENTION:
        return attention_rows(query[:, :, :1], key[:, :, before:], scale)[:, 0], patches
    if name == CLS_PATCH_SIMILARITY:
        return attention_rows(value[:, :, :1], value[:, :, before:], scale)[:, 0], patches
    if name == MEAN_VALUE_SIMILARITY:
        patch_values = value[:, :, before:].float()  # [m, H, N, d]
        return attention_rows(patch_values.mean(dim=2, keepdim=True), patch_values, scale)[:, 0], patches
    if name in (SINK_ATTENTION, SINK_ATTENTION_SUM):
        mean_or_sum, count = sink_attention(query, key, before, signal.settings[0], name == SINK_ATTENTION_SUM)
        return mean_or_sum, count * tokens
    if name == TOWER_KEYS:
        return key[:, :, before:].transpose(1, 2).flatten(2).float(), 0  # [m, H, N, d] -> [m, N, H d]
    if name == ATTENTION_BY_HEAD:
        return attention_by_head(query, key, before), tokens * (1 if before else patches)
    return value.float().mean(dim=1).abs().sum(dim=-1)[:, before:], 0  # [m, T, d] -> [m, T] -> [m, N]


def attention_by_head(query: Tensor, key: Tensor, before: int) -> Tensor:
    """`[m, N, H]` fp32, see `signals.ATTENTION_BY_HEAD`; `query` and `key` are `[m, H, T, d]`."""
    pictures, heads, _, width = query.shape
    asked = query[:, :, :1] if before else query
    asked, key = (part.reshape(pictures * heads, 1, -1, width) for part in (asked, key))  # each head a picture
    if before:
        by_head = attention_rows(asked, key, width**-0.5)[:, 0]  # [m H, T]
    else:
        by_head = attention_received(asked, key, width**-0.5) / asked.shape[2]
    return by_head.view(pictures, heads, -1)[..., before:].transpose(1, 2)


def sink_attention(query: Tensor, key: Tensor, before: int, threshold: float, total: bool) -> tuple[Tensor, int]:
    """Mean (or sum) of the attention rows of the patches that receive much, see `signals.SINK_ATTENTION`.

    The first pass adds up columns, the second forms only the rows in question; how many they are at most is read once
    from the device.

    Args:
        query, key: `[m, H, T, d]`, T = `before` [CLS] tokens and N patches. Softmax runs over all T, the rows and
            columns of [CLS] are then left out, and the rest is not renormalised.
        threshold: t, see `SINK_ATTENTION`; 0 takes all rows.
        total: whether to sum the rows.

    Returns:
        `[m, N]` fp32, and how many rows of every head were formed, of each picture.
    """
    patches = query[:, :, before:]
    _, _, count, width = patches.shape
    scale = width**-0.5

    def rows(chosen: Tensor) -> Tensor:
        return attention_rows(chosen, key, scale)[..., before:]

    received = attention_received(patches, key, scale)[:, before:]  # [m, N]
    if threshold == 0:
        return (received if total else received / count), count
    sinks = received > threshold * received.mean(dim=1, keepdim=True)
    strongest = torch.zeros_like(sinks).scatter(1, received.argmax(dim=1, keepdim=True), True)
    sinks = torch.where(sinks.any(dim=1, keepdim=True), sinks, strongest)
    numbers = sinks.sum(dim=1, keepdim=True)
    most = int(numbers.max())
    if most == count and bool((numbers == count).all()):
        return (received if total else received / count), count
    # the rows of a picture with fewer of them are filled up with rows that count nothing
    places = torch.sort(sinks.to(torch.int8), dim=1, descending=True, stable=True).indices[:, :most]  # [m, most]
    weights = sinks.gather(1, places).to(torch.float32)
    summed = torch.zeros_like(received)
    for start in range(0, most, _CHUNK):
        part = places[:, start : start + _CHUNK]
        index = part[:, None, :, None].expand(-1, query.shape[1], -1, width)  # [m, H, chunk, d]
        summed += (rows(patches.gather(2, index)) * weights[:, start : start + _CHUNK, None]).sum(dim=1)
    return (summed if total else summed / numbers), count + most


def grey_levels(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Grey levels 0..255 of normalised pixels: each colour back to its level, then their mean, rounded.

    Args:
        pixels: `[..., 3, n]`, any float dtype.
        mean, std: of each colour, for pixels in 0..1.

    Returns:
        `[..., n]` int64.
    """
    offset, spread = (torch.tensor(values, device=pixels.device)[:, None] for values in (mean, std))
    levels = ((pixels.float() * spread + offset) * 255).round().clamp(0, 255)
    colours = pixels.shape[-2]
    return (2 * levels.long().sum(dim=-2) + colours) // (2 * colours)  # whole numbers: the same on every device


def grey_entropy(levels: Tensor, base: float) -> Tensor:
    """Entropy of the histogram of grey levels `[..., n]` (int64, 0..255), to the given base: `[...]` fp32.

    0 for one level, log(n) for n different ones.
    """
    flat = levels.reshape(-1, levels.shape[-1])
    counts = torch.zeros(flat.shape[0], 256, device=levels.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))  # whole numbers: exact in any order
    shares = counts / flat.shape[1]
    entropy = -torch.special.xlogy(shares, shares).sum(dim=1) / math.log(base)
    return entropy.view(levels.shape[:-1])
