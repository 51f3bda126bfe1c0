"""The bias of keys that stand for several tokens: what it equals, where it goes, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _key_bias import SIZES, TOLERANCE, answer, key_facts, last_of, plain, recomputed, weighed  # noqa: F401
from _tiny import prompts, tiny_llava
from masked_reference import compare, decoder_inputs, masked_of, relative_error, run_pruned
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tokenprune
from tokenprune.kernels.redistribute_attention import redistribute_attention
from tokenprune.seams import cache_in, cache_name
from tokenprune.state.key_bias import biased_key, biased_query, biased_value


@pytest.mark.parametrize("width", [6, 8, 12, 16, 63, 64, 128])
def test_the_columns_are_an_additive_bias_and_repeated_keys(width):
    generator = torch.Generator().manual_seed(width)
    query = torch.randn(2, 4, 5, width, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(2, 2, 9, width, generator=generator, dtype=torch.float64) for _ in range(2))
    count = torch.randint(1, 6, (9,), generator=generator)
    bias, scale = count.double().log().expand(2, -1), 0.3
    wide = plain(biased_query(query), biased_key(key, bias, scale), biased_value(value), scale)
    assert wide.shape[-1] % 8 == 0 and wide.shape[-1] - width < 10
    assert not wide[..., width:].any()
    truth = plain(query, key, value, scale, bias[:, None, None])
    torch.testing.assert_close(wide[..., :width], truth, rtol=1e-12, atol=1e-12)
    again = plain(query, key.repeat_interleave(count, 2), value.repeat_interleave(count, 2), scale)
    torch.testing.assert_close(wide[..., :width], again, rtol=1e-12, atol=1e-12)
    # keys behind those whose bias is known have none
    short = biased_key(key, bias[:, :4], scale)
    torch.testing.assert_close(short[:, :, 4:], biased_key(key, torch.zeros_like(bias), scale)[:, :, 4:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_little_of_the_bias(dtype):
    sizes = torch.arange(1, 600).float()
    key = biased_key(torch.zeros(1, 1, 599, 64, dtype=dtype), sizes.log()[None], 64**-0.5)
    query = biased_query(torch.zeros(1, 1, 1, 64, dtype=dtype))
    said = (query.double() @ key.double().transpose(2, 3))[0, 0, 0] * 64**-0.5
    error = (said - sizes.double().log()).abs().max()
    assert error < 2e-4, "one column alone is off by 1e-2"
    assert (key[0, 0, :, 64].double() * 64**-0.5 - sizes.double().log()).abs().max() > 1e-3


def test_weights_of_one_change_nothing():
    model, batch = tiny_llava(), prompts([1, 3, 0, 2])
    bare = answer(model, batch, "weighed", keep=9, weigh=0, key_bias=False)
    ones = answer(model, batch, "weighed", keep=9, weigh=1.0)
    assert relative_error(ones, bare) < 1e-6
    off = answer(model, batch, "weighed", keep=9, key_bias=False)
    assert torch.equal(off, bare), "off is stock, bit for bit"
    assert relative_error(answer(model, batch, "weighed", keep=9), bare) > 1e-2
    # where all tokens stay, or there are no pictures, nothing is biased
    text = prompts([0])
    with torch.no_grad():
        assert torch.equal(answer(model, batch, "weighed", keep=36), model(**batch).logits)
        assert torch.equal(answer(model, text, "weighed", keep=9), model(**text).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_token_that_weighs_b_is_b_tokens_alike(attention):
    """The same decoder on a prompt in which each token stands as often as it weighs, at one position, its copies seeing
    each other."""
    model, batch = tiny_llava(attention=attention), prompts([1])
    with tokenprune.applied(model, "weighed", keep=9, positions="keep", outputs="kept") as handle, torch.no_grad():
        decoder = handle.adapter.language_model
        with decoder_inputs(handle.adapter) as calls:
            states = model.model(**batch).last_hidden_state
        stays = handle.stays[0]
        visual = torch.zeros_like(stays)
        visual[last_of(handle).layout.spans[0].places] = True
    embeds, positions = calls[0]["inputs_embeds"], calls[0]["position_ids"]
    count = torch.ones(embeds.shape[1], dtype=torch.int64)
    count[visual[stays]] = torch.tensor(SIZES).long()
    copies = torch.arange(embeds.shape[1]).repeat_interleave(count)
    allowed = (copies[None] <= copies[:, None])[None, None]
    if attention == "eager":
        allowed = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        many = decoder(
            inputs_embeds=embeds[:, copies], position_ids=positions[:, copies], attention_mask=allowed, use_cache=False
        ).last_hidden_state
    assert many.shape[1] > states.shape[1]
    assert relative_error(states[:, copies], many) < 2e-6


def test_eager_and_sdpa_agree():
    batch = prompts([1, 3, 0, 2])
    runs = [run_pruned(tiny_llava(attention=attention), "weighed", 9, batch) for attention in ("sdpa", "eager")]
    assert relative_error(runs[0]["logits"], runs[1]["logits"]) < TOLERANCE
    assert torch.equal(runs[0]["tokens"], runs[1]["tokens"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "method",
    [
        "weighed@9",
        {"method": "pool", "at": "vision:1", "keep": 9, "key_bias": True},
        {"method": "tome", "at": "vision:1", "keep": 9, "key_bias": True},
        {"method": "weighed", "at": "layer:2", "keep": 9},
        [{"prune": "weighed", "keep": 12}, {"at": "layer:1", "prune": "divprune", "keep": 5}],
        [{"prune": "weighed", "keep": 18}, {"at": "layer:2", "prune": "weighed", "keep": 6}],
        [{"prune": "uniform", "keep": 18}, {"at": "layer:3", "prune": "weighed", "keep": 6}],
        [{"prune": "weighed", "keep": 18}, {"at": "layer:2", "prune": "fastv", "keep": 6}],
    ],
    ids=str,
)
def test_prompt_and_decoded_tokens_equal_one_full_masked_pass(method, side):
    batch = prompts([1, 3, 0, 2], side)
    run = run_pruned(tiny_llava(), method, None, batch)
    compare(run, batch, TOLERANCE)
    run["sizes"] = [[None] * len(by_span) for by_span in run["sizes"]]
    truth = masked_of(run, batch).logits()
    assert relative_error(run["logits"], truth) > 1e-3, "a masked model without the bias must say no"


def test_weights_multiply_through_later_merges_and_stay_through_later_cuts():
    model, batch = tiny_llava(), prompts([1])
    twice = [{"prune": "weighed", "keep": 18}, {"at": "layer:2", "prune": "weighed", "keep": 6}]
    with tokenprune.applied(model, twice) as handle, torch.no_grad():
        cache = cache_in(model(**batch))
        first, second = (cut.sizes[0].tolist() for cut in last_of(handle).cuts)
    begun = [SIZES[i % 9] for i in range(18)]
    assert first == begun and second == [begun[3 * i] * SIZES[i] for i in range(6)]
    bias = key_facts(cache).bias
    assert sorted(bias) == [0, 1, 2, 3] and bias[0] is bias[1] and bias[2] is bias[3]
    text = batch["input_ids"].shape[1] - 36
    assert sorted(bias[2][0].exp().round().tolist()) == sorted([1.0] * text + second)
    mixed = [{"prune": "weighed", "keep": 18, "key_bias": False}, {"at": "layer:2", "prune": "weighed", "keep": 6}]
    with tokenprune.applied(model, mixed) as handle, torch.no_grad():
        model(**batch)
        assert [cut.sizes[0] is None for cut in last_of(handle).cuts] == [True, False]
        assert last_of(handle).cuts[1].sizes[0].tolist() == SIZES[:6]


def test_what_a_later_cut_reads_of_attention_has_the_bias():
    model, batch = tiny_llava(), prompts([1, 2])
    heavy = SIZES.copy()
    for place in range(9):
        SIZES[:] = [1e7 if i == place else 1.0 for i in range(9)]
        try:
            stages = [{"prune": "weighed", "keep": 9}, {"at": "layer:2", "prune": "fastv", "keep": 1}]
            with tokenprune.applied(model, stages) as handle, torch.no_grad():
                model(**batch)
                assert [kept.tolist() for row in handle.kept for kept in row] == [[4 * place]] * 3
        finally:
            SIZES[:] = heavy


def test_the_report_counts_what_was_merged():
    model, batch = tiny_llava(), prompts([1, 2])
    with tokenprune.applied(model, "weighed", keep=9) as handle, torch.no_grad():
        model(**batch)
        report = handle.report()
    assert report.merged_tokens == 3 * (sum(SIZES) - 9) and "33 merged into them" in str(report)
    with tokenprune.applied(model, "uniform", keep=9) as handle, torch.no_grad():
        model(**batch)
        assert handle.report().merged_tokens == 0 and "merged" not in str(handle.report())


# --- where it goes ----------------------------------------------------------------------------------------------------


def test_beams_take_it_along():
    batch = prompts([1, 2])
    model = tiny_llava()
    run = run_pruned(model, "weighed", 9, batch)
    with tokenprune.applied(model, "weighed", keep=9), torch.no_grad():
        out = model.generate(
            **batch, max_new_tokens=6, num_beams=3, num_return_sequences=1, do_sample=False, output_scores=True,
            return_dict_in_generate=True, length_penalty=0.0,
        )  # fmt: skip
    tokens = out.sequences[:, batch["input_ids"].shape[1] :]
    masked = masked_of(run, batch)
    masked.embeds = masked.embeds.clone()
    scores = masked.continuation(tokens).log_softmax(-1).gather(2, tokens[..., None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, scores, rtol=1e-4, atol=1e-4)


MOVES: dict[str, Callable[[Any], Any]] = {
    "copied": copy.deepcopy,
    "pickled": lambda cache: pickle.loads(pickle.dumps(cache)),
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "selected": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "repeated": lambda cache: cache.batch_repeat_interleave(2),
    "cropped": lambda cache: cache.crop(-2),
}
ROWS = {"reordered": [1, 0], "selected": [1], "repeated": [0, 0, 1, 1]}


@pytest.mark.parametrize("how", MOVES)
def test_the_cache_takes_it_along(how):
    model, batch = tiny_llava(), prompts([2, 1])
    follow = torch.tensor([[9, 11, 13], [17, 19, 23]])
    with tokenprune.applied(model, "weighed", keep=9), torch.no_grad():

        def step(cache: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            mask = torch.cat([mask, torch.ones(len(ids), cache.get_seq_length() + ids.shape[1] - mask.shape[1])], 1)
            return model(input_ids=ids, attention_mask=mask.long(), **{cache_name(): cache}).logits

        cache = cache_in(model(**batch, use_cache=True))
        truth = step(copy.deepcopy(cache), follow, batch["attention_mask"])
        if how == "cropped":
            step(cache, torch.tensor([[30, 31], [32, 33]]), batch["attention_mask"])
        lost = copy.deepcopy(cache)
        moved = MOVES[how](cache) or cache
        rows = ROWS.get(how, [0, 1])
        said = step(moved, follow[rows], batch["attention_mask"][rows])
        assert {len(bias) for bias in key_facts(moved).bias.values()} == {len(rows)}
        torch.testing.assert_close(said, truth[rows], rtol=1e-5, atol=1e-5)
        lost = MOVES[how](lost) or lost
        lost.tokenprune_facts = None
        assert relative_error(step(lost, follow[rows], batch["attention_mask"][rows]), truth[rows]) > 1e-3


def test_a_further_turn_with_another_picture():
    """Two turns through one cache equal both pictures in one prompt."""
    model, both = tiny_llava(), prompts([2])
    ids = both["input_ids"]
    turn = int((ids[0] == 5).nonzero()[36]) - 1  # between the two pictures
    whole = torch.ones_like(ids)
    with tokenprune.applied(model, "weighed", keep=9, positions="keep"), torch.no_grad():
        truth = model(**both).logits[:, -4:]
        first = model(
            input_ids=ids[:, :turn],
            attention_mask=whole[:, :turn],
            pixel_values=both["pixel_values"][:1],
            use_cache=True,
        )
        second = model(
            input_ids=ids[:, turn:], attention_mask=whole, pixel_values=both["pixel_values"][1:],
            **{cache_name(): cache_in(first)},
        )  # fmt: skip
        bias = key_facts(cache_in(second)).bias[0][0]
    torch.testing.assert_close(second.logits[:, -4:], truth, rtol=1e-4, atol=1e-5)
    assert sorted(bias.exp().round().tolist()) == sorted([1.0] * (len(bias) - 18) + SIZES * 2)


def test_without_a_cache_and_with_a_draft():
    model, batch = tiny_llava(), prompts([1])
    with tokenprune.applied(model, "weighed", keep=9), torch.no_grad():
        greedy = model.generate(**batch, max_new_tokens=6, do_sample=False)
        assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=False), greedy)
        looked_up = model.generate(**batch, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2)
        assert torch.equal(looked_up, greedy)


def test_an_intervention_in_the_same_layers_sees_it(recomputed):  # noqa: F811
    for attention in ("sdpa", "eager"):
        model, batch = tiny_llava(attention=attention), prompts([1, 3, 0, 2])
        alone = run_pruned(model, "weighed@9", None, batch)
        beside = run_pruned(model, "weighed@9+recomputed", None, batch)
        assert relative_error(beside["logits"], alone["logits"]) < TOLERANCE
        assert relative_error(beside["scores"], alone["scores"]) < TOLERANCE
        facts = key_facts(beside["cache"])
        assert sorted(facts.layers) == sorted(facts.bias) == [0, 1, 2, 3]


def test_var_redistributes_what_biased_keys_get():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 3, 8, generator=generator)
    key, value = torch.randn(2, 1, 2, 12, 8, generator=generator)
    count = torch.randint(1, 4, (12,), generator=generator)
    groups = torch.tensor([[0, 1, 2, 1, 1, 3, 2, 1, 0, 1, 2, 0]], dtype=torch.int8)
    rule: Any = {"share": 0.6, "least_mass": 0.05, "most_sink": 0.9, "slack": 0.0, "scale": 0.35}
    bias = count.float().log()[None]
    wide = redistribute_attention(
        biased_query(query), biased_key(key, bias, 0.35), biased_value(value), groups, None, None, **rule
    )
    many: Any = (part.repeat_interleave(count, 2) for part in (key, value))
    truth = redistribute_attention(
        query, next(many), next(many), groups.repeat_interleave(count, 1), None, None, **rule
    )
    torch.testing.assert_close(wide[..., :8], truth, rtol=1e-5, atol=1e-6)
    assert relative_error(redistribute_attention(query, key, value, groups, None, None, **rule), truth) > 1e-2


def test_remove_restores_everything():
    model, batch = tiny_llava(), prompts([1])
    configs = [layer.self_attn.config for layer in model.model.language_model.layers]
    known = set(ALL_ATTENTION_FUNCTIONS.keys())
    with torch.no_grad():
        stock = model(**batch).logits
        handle = tokenprune.apply(model, "weighed", keep=9)
        model(**batch)
        assert set(ALL_ATTENTION_FUNCTIONS.keys()) != known
        handle.remove()
        assert torch.equal(model(**batch).logits, stock)
    assert set(ALL_ATTENTION_FUNCTIONS.keys()) == known
    assert all(layer.self_attn.config is own for layer, own in zip(model.model.language_model.layers, configs))


def test_layers_before_the_cut_keep_their_own_attention():
    model = tiny_llava()
    with tokenprune.applied(model, {"method": "weighed", "at": "layer:2", "keep": 9}):
        names = [layer.self_attn.config._attn_implementation for layer in model.model.language_model.layers]
    assert names[:2] == ["sdpa", "sdpa"] and all(name.startswith("tokenprune") for name in names[2:])
