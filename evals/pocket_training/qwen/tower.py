"""The tower of pocket-qwen on a batch of pictures of one size, faster than the stock forward and equal to it.

The stock forward attends window by window; here windows of one size go together. And scenes are drawn at half the size
that the model sees, each pixel doubled, so the patch embedding can add up its kernel in place of reading all copies.
"""

from __future__ import annotations

# layers of transformers models are untyped modules to pyright, and the recipe handles nothing else
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
from collections import defaultdict
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenprune.evals.pocket.clips import SCALE

_HALF = 14 // SCALE  # pixels of the drawn scene that a patch covers


def run_tower(tower: nn.Module, frames: Tensor) -> Tensor:
    """Normalised ``frames`` [B, 2, 3, H, W] at drawing size (a still one twice) -> tokens [B, rows * cols, width]."""
    rows, cols = frames.shape[-2] // (2 * _HALF), frames.shape[-1] // (2 * _HALF)
    x = _embed(tower, frames, rows, cols)
    cos, sin = _rotary(tower, rows, cols)
    groups = _windows(rows, cols, tower.window_size // 28)
    for depth, block in enumerate(tower.blocks):
        y = block.norm1(x)
        attn = block.attn
        q, k, v = attn.qkv(y).unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(2)
        q, k = _turn(q, cos, sin), _turn(k, cos, sin)
        if depth in tower.fullatt_block_indexes:
            mixed = _attend(q, k, v)
        else:
            mixed = torch.empty_like(q)
            parts = [(index, _attend(*(t[:, index].flatten(0, 1) for t in (q, k, v)))) for index in groups]
            order = torch.cat([index.flatten() for index, _ in parts])
            whole = torch.cat([part.view(len(x), -1, *part.shape[2:]) for _, part in parts], 1)
            mixed = whole[:, torch.argsort(order)]
        x = x + attn.proj(mixed.flatten(2))
        x = x + block.mlp(block.norm2(x))
    return tower.merger(x.flatten(0, 1)).unflatten(0, (len(x), -1))


def _embed(tower: nn.Module, frames: Tensor, rows: int, cols: int) -> Tensor:
    """Patch embeddings [B, rows * cols * 4, width], the four patches of a token side by side."""
    kernel = tower.patch_embed.proj.weight  # [width, 3, 2, 14, 14]
    kernel = kernel.unflatten(3, (_HALF, SCALE)).unflatten(5, (_HALF, SCALE)).sum((4, 6))
    x = frames.unflatten(-2, (rows, 2, _HALF)).unflatten(-1, (cols, 2, _HALF))
    # [B, 2, 3, rows, 2, half, cols, 2, half] -> [B, rows, cols, 2, 2, 3, 2, half, half]
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(1, 4)
    return F.linear(x, kernel.flatten(1))


@lru_cache(maxsize=64)
def _places(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Row and column [rows * cols * 4] of each patch."""
    r, c, i, j = torch.meshgrid(*(torch.arange(n) for n in (rows, cols, 2, 2)), indexing="ij")
    return (2 * r + i).flatten(), (2 * c + j).flatten()


def _rotary(tower: nn.Module, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    turns = tower.rotary_pos_emb.inv_freq
    row, col = _places(rows, cols)
    angles = torch.cat([row[:, None] * turns, col[:, None] * turns], 1)
    angles = torch.cat([angles, angles], 1)[:, None]
    return angles.cos(), angles.sin()


@lru_cache(maxsize=64)
def _windows(rows: int, cols: int, side: int) -> list[Tensor]:
    """Patches of each window [n, length], windows of one length together."""
    row, col = _places(rows, cols)
    window = row // 2 // side * cols + col // 2 // side
    by_length: dict[int, list[Tensor]] = defaultdict(list)
    for name in window.unique():
        found = (window == name).nonzero().flatten()
        by_length[len(found)].append(found)
    return [torch.stack(found) for found in by_length.values()]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, N, heads, d] each -> [B, N, heads, d]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
