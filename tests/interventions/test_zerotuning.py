"""ZeroTuning against the explicit matrix, its invariants, and what is refused."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from _families import batch_of, family
from _tiny import prompts, tiny_llava
from interventions.open_attention import generated, open_attention, second_turn
from masked_reference import compare, relative_error, run_pruned

import tokenprune

TOLERANCE = 1e-5  # relative, fp32


@functools.cache
def model(attention: str = "sdpa"):
    return tiny_llava(attention=attention)


def scaled(gammas):
    """The rule, by its closed form: gamma a_0 / D and a_i / D."""

    def rule(row):
        first = int(row.there.nonzero()[0])
        g = torch.tensor(gammas, dtype=torch.float64)[:, None]
        a = row.weights
        d = 1 + (g - 1) * a[..., first]
        out = a / d[..., None]
        out[..., first] *= g
        odds = [w[:, first + 1 :, first] / w[:, first + 1 :, first + 1 :].sum(-1) for w in (a, out)]
        assert odds[0].numel() == 0 or relative_error(odds[1], g * odds[0]) < 1e-9
        return out

    return rule


def check(found, method, batch, gammas, layers=(0, 1, 2, 3)):
    run = run_pruned(found, method, None, batch, tokens=4)
    with open_attention(run["adapter"], batch, layers, scaled(gammas)) as worst:
        compare(run, batch, TOLERANCE)
    assert worst[0] < 1e-12
    return run


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("images", "side"), [([1], "left"), ([1, 3, 0, 2], "right"), ([2, 1], "left")])
def test_equals_the_explicit_matrix_in_batches(images, side, attention):
    check(model(attention), ["zerotuning(gamma=3.0)"], prompts(images, side), [3.0] * 4)


@pytest.mark.parametrize("before", ["holov@9", "fastv@9", "vmtc(key_bias=True)@9"])
def test_equals_the_explicit_matrix_on_pruned_prompts_by_head_and_layer(before):
    given = {"method": "zerotuning", "gamma": [0.2, 1.0, 5.0, 1.5], "heads": [0, 1, 2], "layers": [1, 3]}
    check(model(), [before, given], prompts([1, 3, 0, 2]), [0.2, 1.0, 5.0, 1.0], [1, 3])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_equals_the_explicit_matrix_with_positions_in_three_dimensions(name):
    check(family(name), ["zerotuning(gamma=0.3)"], batch_of(name, "ragged_left"), [0.3] * 4)


@pytest.mark.parametrize("off", ["zerotuning", "zerotuning(gamma=2.0, heads=[])", "zerotuning(gamma=2.0, layers=[])"])
def test_off_switches_are_stock_bit_for_bit(off):
    batch = prompts([1, 0, 2])
    stock = generated(model(), batch)
    with tokenprune.applied(model(), off) as handle:
        assert torch.equal(generated(model(), batch), stock)
        if "layers" not in off:
            assert "off: gamma is 1" in str(handle.report())


def layer_outputs(found, method, batch, layer=0):
    """What goes into the output projection of a layer, `[B, S, H, d]`."""
    taken = []
    attn = found.model.language_model.layers[layer].self_attn
    hook = attn.o_proj.register_forward_pre_hook(lambda m, a: taken.append(a[0]))
    try:
        with tokenprune.applied(found, method), torch.no_grad():
            found(**batch)
    finally:
        hook.remove()
    return taken[0].unflatten(-1, (-1, attn.head_dim))


def test_one_gamma_and_then_another_are_their_product_and_other_heads_and_the_first_row_keep_theirs():
    batch = prompts([1])
    stock = layer_outputs(model(), "zerotuning", batch)
    out = layer_outputs(model(), "zerotuning(gamma=3.0, heads=[1], layers=[0])", batch)
    torch.testing.assert_close(out[:, :, [0, 2, 3]], stock[:, :, [0, 2, 3]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out[:, 0], stock[:, 0], rtol=1e-5, atol=1e-6)
    assert float((out[:, 5:, 1] - stock[:, 5:, 1]).abs().max()) > 1e-2


def test_a_first_key_that_weighs_nothing_is_one_that_is_hidden():
    batch = prompts([1])
    found = layer_outputs(model(), {"method": "zerotuning", "gamma": 1e-30, "layers": [0]}, batch)
    hidden = {"given": False}

    def hide(row):
        hidden["given"] = True
        logits = row.logits.clone()
        logits[:, 1:, 0] = float("-inf")
        return logits.softmax(-1)

    with tokenprune.applied(model(), "random", 1.0) as handle, torch.no_grad():
        model()(**batch)
        adapter = handle.adapter
    taken = []
    attn = model().model.language_model.layers[0].self_attn
    with open_attention(adapter, batch, [0], hide), torch.no_grad():
        hook = attn.o_proj.register_forward_pre_hook(lambda m, a: taken.append(a[0]))
        model()(**batch)
        hook.remove()
    assert hidden["given"]
    torch.testing.assert_close(found, taken[0].unflatten(-1, (-1, attn.head_dim)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("before", [[], ["vtc_cls@9"]])
def test_a_second_turn(images, before):
    second_turn(model(), [*before, "zerotuning(gamma=3.0)"], images, range(4), scaled([3.0] * 4), TOLERANCE)


def test_text_alone_changes_too_and_the_report_says_what_acts():
    batch = prompts([0, 0])
    with tokenprune.applied(model(), "zerotuning(gamma=3.0, heads=[1, 2])") as handle, torch.no_grad():
        found = generated(model(), batch)
        model()(**prompts([1]))
        assert "zerotuning  layers 0-3; gamma 3.0, heads 1, 2" in str(handle.report())
    assert not torch.equal(found, generated(model(), batch))


def test_half_precision_follows_fp32():
    batch = prompts([1, 2])
    own = tiny_llava().bfloat16()
    half = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        stock, plain = own(**half).logits[real], model()(**batch).logits[real]
        with tokenprune.applied(own, "zerotuning(gamma=3.0)"), tokenprune.applied(model(), "zerotuning(gamma=3.0)"):
            found, truth = own(**half).logits[real], model()(**batch).logits[real]
    assert relative_error(found, truth) < 2 * relative_error(stock, plain), "no worse than bf16 itself"


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("zerotuning(gamma=0)", "gamma must be above 0"),
        ("zerotuning(gamma=[1.0, 2.0])", "has 2 numbers, and this decoder has 4 query heads"),
        ("zerotuning(gamma=2.0, heads=[4])", "heads name 4, and this decoder has query heads 0 to 3"),
        ("zerotuning(heads=one)", "heads of zerotuning must be a list of integers"),
        ("zerotuning(calibration=none.json)", "holds no calibration of zerotuning"),
        ("zerotuning(calibration=none.json, gamma=2.0)", "leave calibration out"),
    ],
)
def test_what_it_cannot_do_is_refused(method, said):
    with pytest.raises((TypeError, ValueError), match=said):
        tokenprune.apply(model(), method)


def test_a_calibration_is_taken_by_decoders_of_its_sizes(tmp_path):
    file = tmp_path / "found.json"
    said = {"gamma": 2.0, "heads": [1], "decoder": {"layers": 4, "heads": 4}}
    file.write_text(json.dumps(said))
    batch = prompts([1])
    with tokenprune.applied(model(), {"method": "zerotuning", "calibration": str(file)}):
        found = generated(model(), batch)
    with tokenprune.applied(model(), "zerotuning(gamma=2.0, heads=[1])"):
        assert torch.equal(generated(model(), batch), found)
    file.write_text(json.dumps({**said, "decoder": {"layers": 5, "heads": 4}}))
    with pytest.raises(ValueError, match="was made on a decoder of"):
        tokenprune.apply(model(), {"method": "zerotuning", "calibration": str(file)})
