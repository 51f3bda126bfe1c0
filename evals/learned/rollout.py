"""Which visual tokens supported a model's own answer: the gradient x attention rollout that GTC learns from.

For each token of the answer, Abar = mean over heads of (A * dA)^+ in each layer, dA the gradient of that token's logit
at the place that predicts it, and R = (I + Abar^L) ... (I + Abar^1); its last row over the visual tokens, mean over the
answer, is the relevance. Only one row is needed, so the product is taken from the left: r = e_p, then r <- r + r Abar^l
for l = L ... 1, the same numbers in O(L S^2) instead of O(L S^3). One pass over prompt and answer serves all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune.evals.learned.replay import Replay


def head_relevance(attention: Tensor, gradient: Tensor) -> Tensor:
    """Abar `[S, S]` fp32 of one layer's `[1, H, S, S]`."""
    return (attention.detach().float() * gradient.float()).clamp_min(0).mean(dim=(0, 1))


def rollout_row(layers: Sequence[Tensor], place: int) -> Tensor:
    """Row `place` of (I + Abar^L) ... (I + Abar^1), `[S]`.

    Args:
        layers: Abar `[S, S]` of each layer, first layer first.
    """
    row = torch.zeros_like(layers[0][0])
    row[place] = 1
    for layer in reversed(layers):
        row = row + row @ layer
    return row


def relevance(replayed: Replay) -> list[Tensor]:
    """For each visual of the prompt, `[N]` fp32, at least 0: mean over the answer's tokens."""
    total = torch.zeros(replayed.logits.shape[0], device=replayed.logits.device)
    for number, token in enumerate(replayed.answer):
        place = replayed.prompt_length - 1 + number
        score = replayed.logits[place, token]
        gradients = torch.autograd.grad(score, replayed.attention, retain_graph=True)
        layers = [head_relevance(*pair) for pair in zip(replayed.attention, gradients)]
        total += rollout_row(layers, place)
    return [total[places.to(total.device)] / len(replayed.answer) for places in replayed.visuals]


def soft_label(relevance: Tensor, masked: float = 0.5) -> Tensor:
    """R* `[N]`, sum 1: the lowest part of the relevances is zeroed, at least half where `masked` is 0.5; ties go to the
    lower index. Uniform where all are 0."""
    count = relevance.shape[0]
    kept = max(1, int(count * (1 - masked)))
    order = relevance.argsort(descending=True, stable=True)[:kept]
    label = torch.zeros_like(relevance).index_copy(0, order, relevance[order])
    total = label.sum()
    return label / total if total > 0 else torch.full_like(relevance, 1 / count)


def instruction_attention(replayed: Replay) -> list[Tensor]:
    """A0: attention of the instruction in layer 0 to the tokens of each visual, `[N]` fp32, mean over heads and rows;
    what `INSTRUCTION_ATTENTION` of layer 0 gives at "input"."""
    rows = replayed.attention[0].detach().float()[0, :, replayed.instruction].mean(dim=(0, 1))
    return [rows[places.to(rows.device)] for places in replayed.visuals]
