"""The masked tower of any class: patches of tokens that left are hidden from attention inside its blocks, which is
computed in the open, in place of the eager function of the model's own file. Which patches are a token's is found by
making one after the other NaN."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from masked_reference import tower_runs
from torch import Tensor

from tokenprune.adapters._attention_calls import attention_in
from tokenprune.engine.layer_check import hooked


def pixels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a features call takes of a batch."""
    return {name: value for name, value in batch.items() if name.startswith(("pixel", "high_res", "image", "spatial"))}


def features(adapter: Any, batch: dict[str, Tensor]) -> Tensor:
    """`[tokens, D]` of a call."""
    with torch.no_grad():
        return torch.cat(
            list(adapter.feature_rows(adapter.entry.get_image_features(**pixels(batch), return_dict=True)))
        )


def patches_of_tokens(adapter: Any, block: Any, batch: dict[str, Tensor]) -> list[list[int]]:
    """By token, which rows of the states that a block leaves, counted over all pictures, it is made of."""
    found: dict[int, list[int]] = {}
    patch, count = 0, 1

    def spoil(module: Any, args: Any, output: Any) -> Any:
        nonlocal count
        states = (output[0] if isinstance(output, tuple) else output).clone(memory_format=torch.contiguous_format)
        count = states.numel() // states.shape[-1]
        states.view(-1, states.shape[-1])[patch] = float("nan")
        return (states, *output[1:]) if isinstance(output, tuple) else states

    with hooked(block.register_forward_hook(spoil, prepend=True)):
        while patch < count:
            for token in features(adapter, batch).isnan().any(dim=-1).nonzero()[:, 0].tolist():
                found.setdefault(token, []).append(patch)
            patch += 1
    return [found[row] for row in sorted(found)]  # row ends are of no patch


@contextlib.contextmanager
def masked_cells(adapter: Any, works: list[tuple[str, Any]], patches: list[list[int]]):
    """Hide the cells that left inside the vision tower: as keys, from the block after their cut on.

    Args:
        works: kind and work of each run of one forward call.
        patches: see `patches_of_tokens`.
    """
    blocks = adapter.vision.blocks
    numbers = {attention_in(block): number for number, block in enumerate(blocks)}
    first = next(iter(numbers))
    file, configs = sys.modules[type(first).__module__], {id(own.config): own.config for own in numbers}
    original, place = file.eager_attention_forward, dict.fromkeys(numbers.values(), 0)
    count = max(patch for own in patches for patch in own) + 1

    def gone(block: int, total: int) -> Tensor:
        (work,), hidden = running, torch.zeros(max(total, count), dtype=torch.bool)
        cuts = [alive for after, alive in work.cuts if after < block]
        start = 0
        for (rows, cols), alive in zip(work.grids, cuts[-1] if cuts else [None] * len(work.grids)):
            kept = range(rows * cols) if alive is None else alive.tolist()
            for token in {*range(rows * cols)} - {*kept}:
                hidden[patches[start + token]] = True
            start += rows * cols
        return hidden

    def open_to(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: Any = None, **rest: Any
    ):
        if module not in numbers:
            return original(module, query, key, value, attention_mask, scaling=scaling, **rest)
        block, (batch, heads, length, width) = numbers[module], query.shape
        at = place[block]
        hidden = gone(block, at + batch * length)[at : at + batch * length].view(batch, 1, 1, length)
        place[block] += batch * length
        mask = attention_mask
        key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, value))
        scores = query @ key.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0)
        return (weights @ value).transpose(1, 2).contiguous(), None

    before = {name: config._attn_implementation for name, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = "eager"
    file.eager_attention_forward = open_to
    try:
        with tower_runs(adapter, works) as running:
            yield
    finally:
        file.eager_attention_forward = original
        for name, config in configs.items():
            config._attn_implementation = before[name]
