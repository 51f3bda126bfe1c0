"""Where a model's own attention looks while it answers, as sparse labels of foreground and background (SD-RPN).

Official numbers and rules are those of YuHengsss/SD-RPN (read, arXiv 2509.16944); what is ours is said where it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.evals.learned.replay import Replay

IGNORE = -100
FOREGROUND, BACKGROUND, LARGEST = 0.2, 0.1, 0.5


def answer_attention(replayed: Replay, visual: int = 0) -> Tensor:
    """`[L, H, N]` fp32: attention of the answer to a visual's tokens, mean over the rows that predict it.

    Our choice: the official rows are those of the answer's tokens themselves, of which an answer of one word has none
    but the last.
    """
    first = replayed.prompt_length - 1
    rows = slice(first, first + len(replayed.answer))
    places = replayed.visuals[visual]
    layers = [
        layer.detach()[0, :, rows].float().mean(dim=1)[:, places.to(layer.device)] for layer in replayed.attention
    ]
    return torch.stack(layers)


def sinks(maps: Tensor, times: float = 10.0) -> Tensor:
    """`[N]` bool: tokens that a prompt looks at whatever it asks, from `[L, H, N]`: in an early layer (2 of 32, in
    proportion, at least the second) they get `times` the mean, over all heads. Officially from 0.001 on, which depends
    on N: ours is relative."""
    early = min(maps.shape[0] - 1, max(1, maps.shape[0] * 2 // 32))
    mass = maps[early].mean(dim=0)
    return mass >= times * mass.mean()


def choose_heads(maps: Sequence[Tensor], count: int = 3) -> list[tuple[int, int]]:
    """(layer, head) of those that look at the picture and at few places of it; best first.

    Our choice, for models of which nobody listed the heads: share of the row that goes to visual tokens, sinks left
    out, times 1 - entropy / log N of how it is spread there, mean over prompts, from half the depth to five sixths.
    That range was settled on pocket-llava by looking at the maps of some ten training scenes beside their boxes, so its
    labels there are not wholly free of what a person knows about the answers; no other model was looked at.

    Args:
        maps: `[L, H, N]` of each prompt.
    """
    layers, heads = maps[0].shape[:2]
    total = torch.zeros(layers, heads)
    for one in maps:
        seen = one.masked_fill(sinks(one), 0.0)
        share = seen.sum(dim=-1)
        spread = seen / share.clamp_min(1e-12)[..., None]
        entropy = -torch.special.xlogy(spread, spread).sum(dim=-1) / math.log(max(2, one.shape[-1]))
        total += share * (1 - entropy)
    inside = range(math.ceil(layers / 2), max(math.ceil(layers / 2) + 1, math.ceil(layers * 5 / 6)))
    ranked = sorted(((layer, head) for layer in inside for head in range(heads)), key=lambda at: -float(total[at]))
    return ranked[:count]


def raw_map(maps: Tensor, heads: Sequence[tuple[int, int]]) -> Tensor:
    """G `[N]`: mean over the chosen heads of `[L, H, N]`."""
    return torch.stack([maps[layer, head] for layer, head in heads]).mean(dim=0)


def box_of(cells: Tensor) -> tuple[int, int, int, int]:
    """(first row, first column, last row, last column), inclusive, around the cells that are on in `[rows, cols]` bool;
    the whole grid where none is."""
    if not bool(cells.any()):
        return 0, 0, cells.shape[0] - 1, cells.shape[1] - 1
    rows, cols = cells.any(dim=1).nonzero()[:, 0], cells.any(dim=0).nonzero()[:, 0]
    return int(rows[0]), int(cols[0]), int(rows[-1]), int(cols[-1])


def tri_state(raw: Tensor, sink: Tensor, grid: tuple[int, int], padded: Tensor | None = None) -> Tensor:
    """`[N]` int64: 1 foreground, 0 background, `IGNORE` elsewhere; all `IGNORE` where the box of the foreground covers
    half of the grid or more.

    With sinks struck out, foreground is above 0.2 of the largest value; background is outside of the foreground's box
    and below 0.1 of it.

    Args:
        raw: `[N]` at least 0, G.
        sink: `[N]` bool, never foreground.
        grid: (rows, cols), rows * cols = N.
        padded: `[N]` bool, cells of padding: never foreground, always background (the official Qwen code).
    """
    out = sink if padded is None else sink | padded
    values = raw.masked_fill(out, 0.0)
    top = values.max()
    front = values > FOREGROUND * top
    low, left, high, right = box_of(front.view(grid))
    label = torch.full(raw.shape, IGNORE, dtype=torch.int64)
    if (high - low + 1) * (right - left + 1) >= LARGEST * raw.shape[0]:
        return label
    outside = torch.ones(grid, dtype=torch.bool)
    outside[low : high + 1, left : right + 1] = False
    label[outside.flatten() & (values < BACKGROUND * top)] = 0
    if padded is not None:
        label[padded] = 0
    label[front] = 1
    return label


def region_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Binary cross-entropy over the cells that have a label, mean; 0 where none has."""
    known = label != IGNORE
    target = label.clamp_min(0).to(logits.dtype)
    each = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (each * known).sum() / known.sum().clamp_min(1)
