"""Finds how much each decoder layer does with visual tokens: the calibration of the intervention shortv.

Layer l contributes KL(p || p_l), in nats: p is the next-token distribution of the stock model at the last token of a
prompt, p_l that with visual tokens standing still in l alone; the mean over the samples. See
`tokenprune.interventions.shortv` for what is second-hand in this rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.api import applied
from tokenprune.evals.models.load import LoadedModel
from tokenprune.evals.tuning.numbers import finite
from tokenprune.interventions.shortv import ShortV


@torch.no_grad()
def contributions(loaded: LoadedModel, inputs: Sequence[Any], say: Callable[[str], None]) -> dict[str, Any]:
    """What the file of a model holds: by layer, the mean divergence over the samples.

    Raises:
        ValueError: the samples show no picture, or the model says NaN.
    """
    model, layers = loaded.model, len(loaded.adapter.layers)
    with applied(model, ShortV(layers=[])) as handle:  # changes nothing, and sees the pictures
        stock = []
        for batch in inputs:
            stock.append(_next_token(model, batch))
            if not handle.report().images:
                raise ValueError("A sample shows no picture.")
    found = []
    for layer in range(layers):
        with applied(model, ShortV(layers=[layer])):
            found.append(sum(_divergence(truth, _next_token(model, one)) for truth, one in zip(stock, inputs)))
        say(f"layer {layer} of {layers} tried")
    return {"layers": layers, "contributions": [total / len(inputs) for total in found]}


def lines(said: dict[str, Any]) -> list[str]:
    """One for each layer of a file, the least first."""
    order = sorted(range(said["layers"]), key=lambda layer: said["contributions"][layer])
    return [f"layer {layer}: {said['contributions'][layer]:.3g} nats" for layer in order]


def _next_token(model: Any, batch: Any) -> Tensor:
    """`[V]` fp64 log-probabilities."""
    return finite(model(**batch, use_cache=False, logits_to_keep=1).logits[0, -1]).double().log_softmax(-1)


def _divergence(truth: Tensor, other: Tensor) -> float:
    said = truth > -torch.inf  # a token that is ruled out adds nothing
    truth, other = truth[said], other[said]
    return float((truth.exp() * (truth - other)).sum().clamp_min(0))
