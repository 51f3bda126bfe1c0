"""VAR against the explicit matrix, on every family, pruned and unpruned; its off-switches; its options."""

from __future__ import annotations

import functools

import pytest
import torch
from _families import BUILDERS, batch_of, family
from _tiny import prompts, tiny_llava
from interventions.explicit import Explicit, explicit_var
from interventions.open_attention import two_turns
from masked_reference import MaskedModel, compare, masked_by, relative_error, run_pruned

import tokenprune
from tokenprune.seams import cache_argument, cache_in

TOLERANCE = 1e-5  # relative, fp32
CHANNELS = [3, 11]


@functools.cache
def model(attention: str = "sdpa"):
    return tiny_llava(attention=attention)


def options(rule: Explicit, **more) -> dict:
    return {"method": "var", "layers": rule.layers, "channels": rule.channels, "tau": rule.tau, "p": rule.p,
            "rho": 1 - rule.most_sink, "s_min": rule.s_min, **more}  # fmt: skip


def usual(**more) -> Explicit:
    settings = {"layers": [1, 2, 3], "channels": CHANNELS, "tau": 2.6, "p": 0.6, "most_sink": 0.15, "s_min": 0.5}
    return Explicit(**{**settings, **more})


def check(found, method, batch, rule, tokens=4):
    run = run_pruned(found, method, None, batch, tokens=tokens)
    with explicit_var(run["adapter"], batch, rule):
        compare(run, batch, TOLERANCE)
    assert 0 < rule.changed < rule.pairs, "some pairs change, some do not"
    assert rule.worst_sum < 1e-12, "rows sum to one"
    return run


@pytest.mark.parametrize("name", BUILDERS)
def test_equals_the_explicit_matrix_on_every_family(name):
    check(family(name), [options(usual())], batch_of(name, "ragged_left"), usual())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("images", "side"), [([1], "left"), ([1, 3, 0, 2], "right"), ([2, 1], "left")])
def test_equals_the_explicit_matrix_in_batches(images, side, attention):
    check(model(attention), [options(usual())], prompts(images, side), usual())


@pytest.mark.parametrize("before", ["vtc_cls@9", "fastv@9", "pyramiddrop@9", "divprune@5"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_the_explicit_matrix_on_pruned_prompts(before, side):
    rule = usual(tau=2.2)
    run = check(model(), [before, options(rule)], prompts([1, 3, 0, 2], side), rule)
    assert run["report"].kept_tokens < run["report"].visual_tokens


def test_official_reading():
    rule = usual(p=0.4, most_sink=0.15, strict=True, slack=1e-6)
    given = {**options(rule), "rho": 0.15, "variant": "official"}
    check(model(), [given], prompts([1, 3, 0, 2]), rule)


def test_text_sinks_alone_may_be_recycled():
    # at this threshold few samples have a visual sink in a layer
    rule = usual(tau=4.2, need_sink=False)
    check(model(), [options(rule, require_visual_sink=False)], prompts([1, 3, 0, 2]), rule)


def generated(found, batch):
    with torch.no_grad():
        return torch.stack(
            found.generate(
                **batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
            ).logits
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "off",
    ["var(p=0, channels=[3])", "var(layers=[], channels=[3])", "var(channels=[3], tau=7)",
     "var(channels=[3], rho=1.01)", "var(channels=[3], s_min=1.01)", "var(channels=[3], tau=7, variant=official)"],
)  # fmt: skip
def test_off_switches_are_stock_bit_for_bit(off, attention):
    found, batch = model(attention), prompts([1, 3, 0, 2])
    stock, pruned = generated(found, batch), None
    with tokenprune.applied(found, off):
        assert torch.equal(generated(found, batch), stock)
    with tokenprune.applied(found, "fastv@9"):
        pruned = generated(found, batch)
    with tokenprune.applied(found, f"fastv@9+{off}"):
        assert torch.equal(generated(found, batch), pruned)


def test_samples_without_sinks_and_text_rows_before_the_picture_keep_their_bits():
    batch = prompts([1, 0, 2])
    rule = usual()
    with torch.no_grad():
        stock = model()(**batch).logits
        with tokenprune.applied(model(), [options(rule)]):
            found = model()(**batch).logits
            alone = model()(**prompts([0, 0])).logits
        assert torch.equal(model()(**prompts([0, 0])).logits, alone), "text alone"
    assert torch.equal(found[1], stock[1])
    for row in (0, 2):
        first = int((batch["input_ids"][row] == 5).nonzero()[0])
        last = int((batch["input_ids"][row] == 5).nonzero()[-1])
        assert torch.equal(found[row, : first + 36], stock[row, : first + 36]), "rows up to the first picture's end"
        assert not torch.equal(found[row, last + 1 :], stock[row, last + 1 :])


@pytest.mark.parametrize("before", [[], ["vtc_cls@9"], ["fastv@9"]])
def test_beam_search(before):
    batch = prompts([1, 1, 0, 1])
    rule = usual(tau=2.2)
    with tokenprune.applied(model(), [*before, options(rule)]) as handle, torch.no_grad():
        found = model().generate(
            **batch, num_beams=3, num_return_sequences=2, max_new_tokens=5, do_sample=False,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        prompt, adapter, kept = handle.last, handle.adapter, handle.kept[::3]
        policies = {stage.site: stage.pruner.positions for stage in handle.stages}
    tokens = found.sequences[:, batch["input_ids"].shape[1] :]
    with tokenprune.applied(model(), "random", 1.0) as handle, torch.no_grad():
        model()(**batch)
        layout = handle.last.layout
    cuts = [(cut.site, [kept[span.sample][span.image] for span in layout.spans]) for cut in prompt.cuts]
    with explicit_var(adapter, batch, rule):
        masked = MaskedModel(adapter, batch, layout, cuts, policies)
        for best in range(2):
            own = tokens[best::2]
            scores = masked.continuation(own).log_softmax(-1).gather(2, own[..., None])[..., 0].mean(1)
            assert relative_error(found.sequences_scores[best::2], scores) < TOLERANCE
    assert 0 < rule.changed < rule.pairs


@pytest.mark.parametrize("before", [[], ["vtc_cls@9"]])
@pytest.mark.parametrize("images", [0, 1])
def test_a_second_turn_and_cropping(images, before):
    rule = usual(tau=2.2)

    def taken_back(cache, second):
        """A few tokens that are taken back leave no trace."""
        mask = prompts([1, 2])["attention_mask"]
        assert cache.get_seq_length() == mask.shape[1]
        more = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
        model()(input_ids=second["input_ids"][:, -3:], attention_mask=more, **cache_argument(cache))
        cache.crop(-3)
        assert cache.get_seq_length() == mask.shape[1]

    turns = two_turns(model(), [*before, options(rule)], images, 4, taken_back)
    detect = torch.zeros_like(turns.whole["attention_mask"], dtype=torch.bool)
    detect[:, : turns.first] = True
    detect[:, turns.first :] = bool(images)  # words of a later text-only turn are no sinks
    with explicit_var(turns.adapter, turns.whole, rule, detect):
        scores = masked_by(turns.adapter, turns.whole, turns.kept, "compact").continuation(turns.tokens)
    assert relative_error(turns.logits, scores) < TOLERANCE
    assert torch.equal(scores.argmax(-1), turns.tokens)
    assert 0 < rule.changed < rule.pairs


def test_a_picture_that_comes_after_text_alone_knows_the_sinks_of_that_text():
    first, second = prompts([0, 0]), prompts([1, 2], seed=9)
    both = {name: torch.cat([first[name], second[name]], 1) for name in ("input_ids", "attention_mask")}
    rule = usual(tau=2.2)
    with tokenprune.applied(model(), [options(rule)]) as handle, torch.no_grad():
        mask = first["attention_mask"]
        cache = cache_in(model()(**first, position_ids=(mask.cumsum(1) - 1).clamp(min=0)))
        found = model().generate(
            input_ids=both["input_ids"], attention_mask=both["attention_mask"], **cache_argument(cache),
            pixel_values=second["pixel_values"], max_new_tokens=4, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        adapter = handle.adapter
    whole = {**both, "pixel_values": second["pixel_values"]}
    tokens = found.sequences[:, both["input_ids"].shape[1] :]
    with explicit_var(adapter, whole, rule):
        scores = masked_by(adapter, whole, [[torch.arange(36)], [torch.arange(36)] * 2], "compact").continuation(tokens)
    assert relative_error(torch.stack(found.logits, 1), scores) < TOLERANCE
    assert int((rule.sinks[2][:, : mask.shape[1]] == 3).sum()), "text sinks in the first turn"


def test_assisted_decoding_gives_the_tokens_of_plain_decoding():
    batch, rule = prompts([1]), usual(tau=2.2)
    with tokenprune.applied(model(), [options(rule)]), torch.no_grad():
        plain = model().generate(**batch, max_new_tokens=8, do_sample=False)
        found = model().generate(**batch, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(found, plain)


# --- this model alone -----------------------------------------------------------------------------------------------


def test_other_models_and_the_attention_registry_are_untouched():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    other, batch, before = tiny_llava(), prompts([1]), dict(ALL_ATTENTION_FUNCTIONS)
    own = tiny_llava()
    configs = [layer.self_attn.config for layer in own.model.language_model.layers]
    # a handle of a test that failed before may live on, and its function with it
    stocks = {name: function for name, function in before.items() if not name.startswith("tokenprune")}
    with torch.no_grad():
        stock = other(**batch).logits
        with tokenprune.applied(own, [options(usual())]):
            assert {k: v for k, v in ALL_ATTENTION_FUNCTIONS.items() if not k.startswith("tokenprune")} == stocks
            assert set(ALL_ATTENTION_FUNCTIONS) - set(before)
            assert torch.equal(other(**batch).logits, stock)
            assert not torch.equal(own(**batch).logits, stock)
            assert own.config.text_config._attn_implementation == "sdpa", "masks are made as ever"
            with tokenprune.applied(other, [options(usual(p=0.3))]):
                both = other(**batch).logits
            assert not torch.equal(both, own(**batch).logits) and not torch.equal(both, stock)
        assert torch.equal(own(**batch).logits, stock)
    after = dict(ALL_ATTENTION_FUNCTIONS)
    assert after.items() <= before.items() and stocks.items() <= after.items()
    assert all(layer.self_attn.config is one for layer, one in zip(own.model.language_model.layers, configs))


def test_an_error_in_the_middle_leaves_the_model_usable():
    own, batch = tiny_llava(), prompts([1])
    with torch.no_grad(), tokenprune.applied(own, [options(usual())]):
        good = own(**batch).logits
        hook = own.model.language_model.layers[2].mlp.register_forward_pre_hook(lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            own(**batch)
        hook.remove()
        assert torch.equal(own(**batch).logits, good)


def test_half_precision_follows_fp32():
    batch = prompts([1, 2])
    own = tiny_llava().bfloat16()
    half = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
    with torch.no_grad(), tokenprune.applied(own, [options(usual())]):
        found = own(**half).logits[batch["attention_mask"].bool()]
    with torch.no_grad():
        stock = own(**half).logits[batch["attention_mask"].bool()]
        with tokenprune.applied(model(), [options(usual())]):
            truth = model()(**batch).logits[batch["attention_mask"].bool()]
        plain = model()(**batch).logits[batch["attention_mask"].bool()]
    assert relative_error(found, truth) < 2 * relative_error(stock, plain), "no worse than bf16 itself"


def test_gradients_are_finite_in_padded_batches():
    own, batch = tiny_llava(), prompts([1, 3, 0, 2])
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] == 5), -100)
    with tokenprune.applied(own, [options(usual())]):
        own(**batch, labels=labels).loss.backward()
    grads = [p.grad for p in own.model.language_model.parameters() if p.grad is not None]
    assert grads and all(bool(grad.isfinite().all()) for grad in grads)


# --- beside pruners -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stay", ["keep", "drop"])
def test_sinks_are_kept_out_of_a_ranking_inside_the_decoder(stay):
    batch, rule = prompts([1, 2]), usual(tau=2.2, layers=[2, 3])
    given = options(rule, visual_sinks=stay)
    with tokenprune.applied(model(), [options(rule)]) as handle, torch.no_grad():
        model()(**batch)
        groups = handle.last.noted[0][2]["groups"]
        layout = handle.last.layout
    run = run_pruned(model(), ["fastv@9", given], None, batch, tokens=4)
    for span, tokens in zip(layout.spans, run["cuts"][-1][1]):
        sinks = (groups[span.sample, span.places] == 2).nonzero()[:, 0]
        if stay == "keep":
            assert set(sinks.tolist()) <= set(tokens.tolist()) and len(tokens) == 9 + len(sinks)
        else:
            assert not set(sinks.tolist()) & set(tokens.tolist()) and len(tokens) == 9
    with explicit_var(run["adapter"], batch, rule):
        compare(run, batch, TOLERANCE)


@pytest.mark.parametrize("method", [[], ["vtc_cls@9"], ["fastv(layer=1)@9"], ["todre@9"]])
@pytest.mark.parametrize("stay", ["keep", "drop"])
def test_keeping_sinks_out_of_rankings_that_are_none_of_its_own_is_refused(method, stay):
    var = f"var(channels=[3],layers=[2],visual_sinks={stay})"
    with pytest.raises(ValueError, match="K being one of var's layers"):
        tokenprune.apply(model(), [*method, var])
    tokenprune.apply(model(), [*method, f"var(channels=[3],layers=[],visual_sinks={stay})"]).remove()


def test_report_names_layers_channels_evidence_and_sinks():
    with tokenprune.applied(model(), ["vtc_cls@9", "var(channels=[3, 11], tau=2.2)"]) as handle, torch.no_grad():
        model()(**prompts([1, 2]))
        text = str(handle.report())
        noted = handle.last.noted[0]
        assert handle.label == "vtc_cls@9 + var(tau=2.2,channels=[3, 11])"
    assert "layers 2; channels 3, 11 (given by the caller); tau 2.2, p 0.6, rho 0.8 (paper)" in text
    visual = float((noted[2]["groups"] == 2).sum()) / 2
    assert visual > 0 and f"{visual:.1f} visual" in text
