"""The bias of keys that stand for several tokens: `log b` on the attention logits of a key that stands for b.

Attention with it is attention over keys of which each is there b times. It needs no mask: two more columns of the query
are 1, and those of the key hold the bias over the scale, so any attention function computes it, the fast ones too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenprune.state.prompt_state import Prompt

_MULTIPLE = 8  # of a head's width, which flash kernels want


def biased_width(width: int) -> int:
    """The width of a head with the columns of the bias."""
    return (width + 2 + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE


def biased_query(query: Tensor) -> Tensor:
    """`[..., R, d]` to `[..., R, d']`: the columns of the bias are 1."""
    width = query.shape[-1]
    ones = query.new_ones(*query.shape[:-1], 2)
    return pad(torch.cat([query, ones], dim=-1), (0, biased_width(width) - width - 2))


def biased_key(key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """`[B, H, K, d]` to `[B, H, K, d']`: its products with a biased query, times `scale`, are larger by `bias`.

    Args:
        bias: `[B, <= K]` fp32; keys behind have none.
        scale: of the dot products.
    """
    width = key.shape[-1]
    wanted = pad(bias.to(key.device), (0, key.shape[2] - bias.shape[1])) / scale
    # in half precision one column would lose digits that a second one has room for
    high = wanted.to(key.dtype)
    low = (wanted - high.to(wanted.dtype)).to(key.dtype)
    columns = torch.stack([high, low], dim=-1)[:, None].expand(-1, key.shape[1], -1, -1)  # [B, H, K, 2]
    return pad(torch.cat([key, columns], dim=-1), (0, biased_width(width) - width - 2))


def biased_value(value: Tensor) -> Tensor:
    """`[B, H, K, d]` to `[B, H, K, d']`, zeros behind: fast kernels want it as wide as the key."""
    return pad(value, (0, biased_width(value.shape[-1]) - value.shape[-1]))


def standing_bias(prompt: Prompt | None, batch_size: int, length: int, device: torch.device) -> Tensor | None:
    """`[B, P]` fp32: the bias of the tokens of a prompt as they stand now; None where each stands for itself."""
    if prompt is None or all(alive.sizes is None for alive in prompt.alive):
        return None
    bias = torch.zeros(batch_size, length, device=device)
    for span, alive in zip(prompt.layout.spans, prompt.alive):
        if alive.sizes is not None:
            bias[span.sample, alive.places.to(device)] = alive.sizes.to(device).log()
    return bias


def joined_bias(before: Tensor | None, new: Tensor | None, held: int) -> Tensor | None:
    """`[B, <= held + P]` fp32: the bias of a layer's keys; keys behind have none.

    Args:
        before: `[B, <= held]`, of keys that were there before the call.
        new: `[B, P]`, of those that the call brings.
        held: keys that were there before the call.
    """
    if new is None or not held:
        return before if new is None else new
    old = new.new_zeros(new.shape[0], held)
    if before is not None:
        old[:, : before.shape[1]] = before.to(new.device)
    return torch.cat([old, new], dim=1)
