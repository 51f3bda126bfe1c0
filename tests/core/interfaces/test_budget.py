"""Budgets as counts, fractions and means over the decoder's layers."""

from __future__ import annotations

import pytest
import torch
from _families import family
from _tiny import prompts, tiny_llava

import tokenprune


def test_fractions_round_to_the_nearest_count():
    from tokenprune.interfaces.budget import Budget

    # the papers' 11.1 percent of 576 is 64, which 0.111 * 576 = 63.9 must give
    assert [Budget(x).tokens(576) for x in (0.111, 0.222, 1 / 3, 1e-9, 1.0)] == [64, 128, 192, 1, 576]
    assert Budget(64).tokens(36) == 36


def test_an_average_as_a_fraction_beside_a_count() -> None:
    plan = [{"prune": "random"}, {"prune": "fastv", "keep": 4}]
    model = tiny_llava(layers=8)
    with tokenprune.applied(model, plan, average=0.25) as handle, torch.no_grad():
        model(**prompts([1]))
        assert handle.report().equivalent_tokens == pytest.approx(9, abs=0.2)
    with pytest.raises(ValueError, match="give both as fractions"):
        tokenprune.apply(family("qwen2_vl"), plan, average=0.25)


def test_one_token_is_no_fraction() -> None:
    for keep, count in ((1, 2), (2, 2), (1.0, 1)):
        with tokenprune.applied(tiny_llava(layers=8), "todre(tau=9)", keep=keep) as handle:
            assert len(handle.stages) == count
