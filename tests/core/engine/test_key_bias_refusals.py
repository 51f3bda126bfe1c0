"""What the key bias cannot do is refused, and what it does on a flash function and to gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from _key_bias import SIZES, TOLERANCE, answer, flash_like, key_facts, last_of, plain, recomputed, weighed  # noqa: F401
from _tiny import prompts, tiny_llava
from masked_reference import relative_error, run_pruned
from transformers import DynamicCache
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tokenprune
from tokenprune.registry import METHODS
from tokenprune.seams import cache_in, cache_name


def test_flash_functions_get_it_in_columns():
    ALL_ATTENTION_FUNCTIONS["flash_attention_like"] = flash_like
    AttentionMaskInterface.register("flash_attention_like", flash_attention_mask)
    try:
        batch = prompts([1, 3, 0, 2])
        model = tiny_llava()
        truth = run_pruned(model, "weighed", 9, batch)
        model.model.language_model.config._attn_implementation = "flash_attention_like"
        run = run_pruned(model, "weighed", 9, batch)
    finally:
        ALL_ATTENTION_FUNCTIONS.pop("flash_attention_like")
        AttentionMaskInterface._global_mapping.pop("flash_attention_like")
    assert relative_error(run["logits"], truth["logits"]) < TOLERANCE
    assert torch.equal(run["tokens"], truth["tokens"])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["uniform", "fastv", "downsample"])
def test_methods_that_merge_nothing_refuse_it(name):
    with pytest.raises(ValueError, match=f"{name} merges none of the decoder's tokens"):
        tokenprune.apply(tiny_llava(), name, keep=9, key_bias=True)
    assert not METHODS.get(name)(key_bias=False).biases_keys
    with pytest.raises(ValueError, match="true or false, got 'yes'"):
        METHODS.get(name)(key_bias="yes")


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
def test_methods_that_mix_a_token_into_several_refuse_it(name):
    with pytest.raises(ValueError, match=f"{name} mixes a token into several"):
        tokenprune.apply(tiny_llava(), name, keep=9, key_bias=True)


def test_a_method_that_does_not_say_its_sizes():
    model, said = tiny_llava(), "does not say how many each kept one stands for"
    with tokenprune.applied(model, "weighed", keep=9, weigh=0), pytest.raises(ValueError, match=said):
        model(**prompts([1]))


def test_decoders_that_cannot_have_it():
    for kind in ("flex_attention", "paged|sdpa"):
        model = tiny_llava()
        model.model.language_model.config._attn_implementation = kind
        with pytest.raises(ValueError, match="key_bias of weighed works with SDPA, eager and flash"):
            tokenprune.apply(model, "weighed", keep=9)
        with tokenprune.applied(model, "weighed", keep=9, key_bias=False):
            pass
    model = tiny_llava()
    model.model.language_model.config.attn_logit_softcapping = 50.0
    with pytest.raises(ValueError, match="caps them afterwards \\(attn_logit_softcapping=50\\)"):
        tokenprune.apply(model, "weighed", keep=9)
    model = tiny_llava()
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    model.model.language_model.config.head_dim = 256
    with pytest.raises(ValueError, match="needs heads of 264 numbers"):
        tokenprune.apply(model, "weighed", keep=9)


def test_layers_that_run_past_the_function_are_found():
    model, batch = tiny_llava(), prompts([1])
    with tokenprune.applied(model, "weighed", keep=9):
        attention = model.model.language_model.layers[2].self_attn
        attention.config._attn_implementation = "sdpa"
        with pytest.raises(RuntimeError, match="Decoder layer 2 computed its attention past"):
            model(**batch)


def test_a_cache_is_not_continued_without_it():
    model, batch = tiny_llava(), prompts([1])
    with torch.no_grad():
        with tokenprune.applied(model, "weighed", keep=9):
            cache = cache_in(model(**batch, use_cache=True))
        more = {
            "input_ids": torch.tensor([[9]]),
            "attention_mask": torch.ones(1, batch["input_ids"].shape[1] + 1).long(),
        }
        for method in ("uniform", "pool"):
            with tokenprune.applied(model, method, keep=9), pytest.raises(ValueError, match="holds merged tokens"):
                model(**more, **{cache_name(): copy.deepcopy(cache)})
        with tokenprune.applied(model, "pool", keep=9, key_bias=True):
            model(**more, **{cache_name(): copy.deepcopy(cache)})
        assert isinstance(cache, DynamicCache) and not math.isnan(float(key_facts(cache).bias[0].sum()))


def test_checkpointing_and_attention_maps_are_refused():
    model, batch = tiny_llava(), prompts([1])
    with tokenprune.applied(model, "weighed", keep=9):
        with pytest.raises(ValueError, match="pass key_bias=False to a method that merges"):
            model(**batch, output_attentions=True)
        model.train()
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        with pytest.raises(
            ValueError, match="key_bias of weighed acts in decoder layer 0, which gradient checkpointing"
        ):
            model(**batch)


def test_gradients_pass_through_it():
    model, batch = tiny_llava(), prompts([1])
    with tokenprune.applied(model, "weighed", keep=9):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
    weights = [layer.self_attn.k_proj.weight.grad for layer in model.model.language_model.layers]
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in weights)
