"""The cache of a pruned prompt outside the method that pruned it."""

from __future__ import annotations

import copy

import pytest
import torch
from _tiny import prompts, tiny_llava

import tokenprune
from tokenprune.seams import cache_argument, cache_in


@pytest.mark.parametrize("method", ["vtc_cls@8", "vtc_cls(positions=keep)@8", "fastv@8"])
def test_a_pruned_cache_is_refused_by_a_model_that_does_not_know(method):
    model, batch = tiny_llava(), prompts([1])
    with tokenprune.applied(model, method), torch.no_grad():
        first = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[9, 10, 11]])], 1)
        turn = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
        model.generate(ids, **cache_argument(copy.deepcopy(cache_in(first))), **turn)
    with pytest.raises(RuntimeError, match="holds a pruned prompt"), torch.no_grad():
        model.generate(ids, **cache_argument(cache_in(first)), **turn)
