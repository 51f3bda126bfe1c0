"""The whole softmax matrices of a vision tower, as transformers' own eager attention computes them, and what is read of
them by visual token."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters._attention_calls import attention_in


@contextlib.contextmanager
def eager_matrices(vision: Any, block: int):
    """Softmax matrices `[b, H, T, T]` of a block, as the eager function of the model's own file computes them."""
    attention = attention_in(vision.blocks[block])
    file, before = sys.modules[type(attention).__module__], attention.config._attn_implementation
    original, found = file.eager_attention_forward, []

    def kept(module: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(module, *args, **kwargs)
        if module is attention:
            found.append(output[1].detach())
        return output

    attention.config._attn_implementation, file.eager_attention_forward = "eager", kept
    try:
        yield found
    finally:
        attention.config._attn_implementation, file.eager_attention_forward = before, original


def expected(matrices: list[Tensor], patches: list[list[int]], sizes: list[int], cls: bool) -> Tensor:
    """`[tokens]`: what [CLS] gives to the patches of each token, or all patches of its picture do, in the mean.

    Args:
        matrices: see `eager_matrices`.
        patches: see `patches_of_tokens`.
        sizes: tokens of each picture.
    """
    blocks = [one.mean(0) for part in matrices for one in part]  # [T, T] each
    whole = torch.block_diag(*blocks)
    length, values, first = blocks[0].shape[0], [], 0
    for size in sizes:
        own = patches[first : first + size]
        rows = [own[0][0] // length * length] if cls else [patch for token in own for patch in token]
        given = whole[rows].mean(0)
        values += [given[token].mean() for token in own]
        first += size
    return torch.stack(values)
