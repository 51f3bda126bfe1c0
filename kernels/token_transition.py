"""How much the two branches of a decoder layer change each token: length and direction, from four tensors in one read.

A pre-norm layer adds attention(x) and then mlp(y) to its residual stream; x and y are normalised states. What a branch
does to a token is the ratio of the lengths of its output and its input, and the cosine between the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-8  # lengths below it count as this, so that rows of zeros give 0 and no NaN


def token_transition(
    attention_in: Tensor, attention_out: Tensor, mlp_in: Tensor, mlp_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Gain and cosine of each token in both branches, in fp32.

    Reads each of the four tensors once and needs no matrix product.

    Args:
        attention_in: `[B, S, D]`, any float dtype: what enters the attention branch, behind its norm.
        attention_out: `[B, S, D]`, what leaves it, before it is added to the residual.
        mlp_in: `[B, S, D]`, likewise of the MLP branch.
        mlp_out: `[B, S, D]`.

    Returns:
        gain `[2, B, S]`, length of the output over length of the input, and cosine `[2, B, S]` of the two; index 0 is
        the attention, 1 the MLP. Lengths are at least `TINY`; the cosine is the dot product over both of them.

    Raises:
        ValueError: the four shapes differ, or are not `[B, S, D]`.
    """
    given = (attention_in, attention_out, mlp_in, mlp_out)
    if attention_in.dim() != 3 or any(part.shape != attention_in.shape for part in given):
        raise ValueError(
            f"token_transition needs four tensors of one shape [B, S, D], got {[tuple(part.shape) for part in given]}."
        )
    gains, cosines = [], []
    for before, after in ((attention_in, attention_out), (mlp_in, mlp_out)):
        before, after = before.float(), after.float()
        entered = before.square().sum(dim=-1).sqrt().clamp(min=TINY)
        left = after.square().sum(dim=-1).sqrt()
        gains.append(left / entered)
        cosines.append((before * after).sum(dim=-1) / (entered * left.clamp(min=TINY)))
    return torch.stack(gains), torch.stack(cosines)
