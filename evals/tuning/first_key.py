"""Finds gamma and heads of zerotuning: the calibration of the weight of a row's first key.

Source: the paper's three steps (see `tokenprune.interventions.zerotuning`). One gamma of 2 acts in one head alone, in
all layers; a head is raised where that is better than the stock model and lowered where it is worse; of the two classes
the larger is kept, and gamma is the best of a grid on it.

Better is what lowers the mean entropy of the next token (no labels), or what raises the share of samples whose next
token begins the answer (labels; our choice: a forward a sample, no generation). Also our choice: the grid, and that
among equals the gamma nearest to 1 wins. Neither sees held-out samples: test on others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.api import applied
from tokenprune.evals.models.load import LoadedModel
from tokenprune.evals.tuning.numbers import finite
from tokenprune.interventions.zerotuning import ZeroTuning

GRID = (0.3, 0.5, 0.7, 0.85, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
PROBE = 2.0
"""The gamma with which heads are told apart."""


def entropy(logits: Tensor) -> float:
    """Of the distribution of `[V]` logits, in nats."""
    log_probability = logits.double().log_softmax(-1)
    log_probability = log_probability[log_probability > -torch.inf]  # a token that is ruled out adds nothing
    return float(-(log_probability.exp() * log_probability).sum())


@torch.no_grad()
def first_key(
    loaded: LoadedModel, inputs: Sequence[Any], answers: Sequence[Any] | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """What the file of a model holds.

    Args:
        answers: of each prompt, for labels; None: by entropy.

    Raises:
        ValueError: a sample has no answer, or the model says NaN.
    """
    decoder = loaded.adapter.language_model.config
    heads, model = decoder.num_attention_heads, loaded.model
    begins = None if answers is None else [_first_tokens(loaded, answer) for answer in answers]

    def cost(gamma: float, chosen: Sequence[int]) -> float:
        total = 0.0
        with applied(model, ZeroTuning(gamma=gamma, heads=list(chosen))):
            for number, batch in enumerate(inputs):
                logits = model(**batch, use_cache=False, logits_to_keep=1).logits[0, -1]
                finite(logits)
                total += entropy(logits) if begins is None else float(int(logits.argmax()) not in begins[number])
        return total / len(inputs)

    stock = cost(1.0, range(heads))
    single = []
    for head in range(heads):
        single.append(cost(PROBE, [head]))
        say(f"head {head} of {heads} tried")
    raised = [head for head in range(heads) if single[head] < stock]
    lowered = [head for head in range(heads) if single[head] > stock]
    chosen = max((raised, lowered), key=len) or list(range(heads))
    tried = {gamma: stock if gamma == 1 else cost(gamma, chosen) for gamma in GRID}
    gamma = min(GRID, key=lambda one: (tried[one], abs(math.log(one))))
    return {
        "decoder": {"layers": len(loaded.adapter.layers), "heads": heads},
        "gamma": gamma,
        "heads": chosen,
        "by": "entropy" if begins is None else "answers",
        "stock": stock,
        "single_heads": single,
        "grid": [[one, tried[one]] for one in GRID],
    }


def lines(said: dict[str, Any]) -> list[str]:
    """The grid of a file, and what came of it."""
    what = "nats" if said["by"] == "entropy" else "of the answers begin wrong"
    found = [f"gamma {gamma:g}: {cost:.4g} {what}" for gamma, cost in said["grid"]]
    return [*found, f"gamma {said['gamma']:g} in heads {', '.join(map(str, said['heads']))}"]


def _first_tokens(loaded: LoadedModel, answer: Any) -> set[int]:
    """Ids with which an accepted answer may begin, as a word of its own or behind another."""
    if answer is None:
        raise ValueError("A sample has no answer. Leave --labels out, or give data with answers.")
    tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
    texts = [str(one) for one in (answer if isinstance(answer, (list, tuple)) else [answer])]
    spelled = [form for text in texts for form in (text, f" {text}")]
    return {ids[0] for form in spelled if (ids := tokenizer(form, add_special_tokens=False)["input_ids"])}
