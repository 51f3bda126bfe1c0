"""The masked tower of any class: patches of tokens that left are hidden from attention inside its blocks, which is
computed in the open, in place of the eager function of the model's own file. Which patches are a token's is found by
making one after the other NaN."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from masked_reference import tower_runs
from torch import Tensor

from tokenprune.adapters._attention_calls import attention_in
from tokenprune.engine.layer_check import hooked


def pixels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a features call takes of a batch with pictures."""
    return {name: value for name, value in batch.items() if name.startswith(("pixel", "high_res", "image", "spatial"))}


def features(adapter: Any, batch: dict[str, Tensor], kind: str = "image") -> Tensor:
    """`[tokens, D]` of a call; of a batch with videos, of visuals of one `kind`."""
    call = getattr(adapter.entry, adapter.features[kind])
    takes = inspect.signature(call).parameters
    given = pixels(batch) if len(adapter.features) == 1 or "pixel_values_videos" not in batch else batch
    given = given if given is not batch else {name: value for name, value in batch.items() if name in takes}
    with torch.no_grad():
        return torch.cat(list(adapter.feature_rows(call(**given, return_dict=True))))


def patches_of_tokens(adapter: Any, block: Any, batch: dict[str, Tensor], kind: str = "image") -> list[list[int]]:
    """By token, which rows of the states that a block leaves, counted over all pictures or videos, it is made of."""
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
            for token in features(adapter, batch, kind).isnan().any(dim=-1).nonzero()[:, 0].tolist():
                found.setdefault(token, []).append(patch)
            patch += 1
    return [found[row] for row in sorted(found)]  # row ends are of no patch


@contextlib.contextmanager
def masked_cells(adapter: Any, works: list[tuple[str, Any]], patches: list[list[int]] | Mapping[str, list[list[int]]]):
    """Hide the cells that left inside the vision tower: as keys, from the block after their cut on.

    Args:
        works: kind and work of each run of one forward call.
        patches: see `patches_of_tokens`; by kind of visuals where there are several.
    """
    blocks = adapter.vision.blocks
    numbers = {attention_in(block): number for number, block in enumerate(blocks)}
    first = next(iter(numbers))
    file, configs = sys.modules[type(first).__module__], {id(own.config): own.config for own in numbers}
    original = file.eager_attention_forward
    place: dict[tuple[int, int], int] = {}  # rows that a block has done of a run
    by_kind = patches if isinstance(patches, Mapping) else {kind: patches for kind, _ in works}
    count = max(patch for tokens in by_kind.values() for own in tokens for patch in own) + 1

    def gone(block: int, total: int) -> Tensor:
        (work,), hidden = running, torch.zeros(max(total, count), dtype=torch.bool)
        own_patches = by_kind[next(kind for kind, one in works if one is work)]
        cuts = [alive for after, alive in work.cuts if after < block]
        start = 0
        for (rows, cols), alive in zip(work.grids, cuts[-1] if cuts else [None] * len(work.grids)):
            kept = range(rows * cols) if alive is None else alive.tolist()
            for token in {*range(rows * cols)} - {*kept}:
                hidden[own_patches[start + token]] = True
            start += rows * cols
        return hidden

    def open_to(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: Any = None, **rest: Any
    ):
        if module not in numbers:
            return original(module, query, key, value, attention_mask, scaling=scaling, **rest)
        block, (batch, heads, length, width) = numbers[module], query.shape
        own = id(running[0]), block
        at = place.get(own, 0)
        hidden = gone(block, at + batch * length)[at : at + batch * length].view(batch, 1, 1, length)
        place[own] = at + batch * length
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
