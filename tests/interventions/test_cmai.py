"""CMAI against the explicit matrix, the invariants of its card, and what is refused."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from _families import batch_of, family
from _tiny import prompts, tiny_llava
from interventions.open_attention import generated, open_attention, second_turn
from masked_reference import compare, run_pruned

import tokenprune

TOLERANCE = 1e-5  # relative, fp32


@functools.cache
def model(attention: str = "sdpa"):
    return tiny_llava(attention=attention)


class Reference:
    """The rule, from its card; `turns` are places at which further turns begin."""

    def __init__(self, rho=0.5, theta=None, own=0.0, measured=1, turns=()):
        self.rho, self.theta, self.own, self.measured, self.turns = rho, theta, own, measured, turns
        self.hidden: dict[int, torch.Tensor] = {}
        self.pairs = self.all = 0

    def __call__(self, row):
        if row.layer == self.measured:
            self.hidden[row.sample] = self.measure(row)
            return None
        hide = self.hidden[row.sample]
        return row.logits.masked_fill(hide, float("-inf")).softmax(-1)

    def measure(self, row):
        a, total = row.weights.mean(0), row.logits.shape[1]
        hide = torch.zeros(total, total, dtype=torch.bool)
        starts = [0, *self.turns, row.prompt]
        for begin, end in zip(starts, starts[1:]):
            own = torch.arange(total).ge(begin) & torch.arange(total).lt(end) & row.there
            images = (row.visual & own).nonzero()[:, 0]
            if not len(images):
                continue
            sees = row.logits[0][:, images] > float("-inf")
            text = (own & ~row.visual & (torch.arange(total) > images[0])).nonzero()[:, 0]
            if not len(text):
                continue
            a_ti, a_tt = a[text][:, images], a[text][:, text]
            a_ti, a_tt = a_ti / a_ti.sum(-1, keepdim=True), a_tt / a_tt.sum(-1, keepdim=True)
            f = self.own * a_ti + (1 - self.own) * a_tt @ a_ti
            torch.testing.assert_close(f.sum(-1), torch.ones(len(text), dtype=torch.float64))
            for scores, place in zip(f, text):
                seen = sees[place]
                count = int(seen.sum())
                scores = scores.masked_fill(~seen, -1)
                if self.theta is None:
                    stay = scores.topk(math.ceil(self.rho * count)).indices
                else:
                    stay = (scores >= self.theta / count).nonzero()[:, 0] if count else []
                    stay = scores.argmax()[None] if not len(stay) else stay
                out = torch.ones(len(images), dtype=torch.bool).index_fill(0, stay, False) & seen
                hide[place, images[out]] = True
                self.pairs, self.all = self.pairs + int(out.sum()), self.all + count
            later = (~row.visual & (torch.arange(total) >= end)).nonzero()[:, 0]  # rows of pictures never change
            hide[later[:, None], images] = hide[text[-1], images]
        return hide


def check(found, method, batch, rule, layers=(1, 2, 3)):
    run = run_pruned(found, method, None, batch, tokens=4)
    with open_attention(run["adapter"], batch, layers, rule) as worst:
        compare(run, batch, TOLERANCE)
    assert worst[0] < 1e-12 and 0 < rule.pairs < rule.all


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("images", "side"), [([1], "left"), ([1, 3, 0, 2], "left"), ([2, 1], "left")])
def test_equals_the_explicit_matrix_in_batches(images, side, attention):
    check(model(attention), ["cmai"], prompts(images, side), Reference())


@pytest.mark.parametrize("before", ["holov@9", "fastv@9", "fastv(layer=1)@9"])
def test_equals_the_explicit_matrix_on_pruned_prompts(before):
    check(model(), [before, "cmai(rho=0.3, own=0.25)"], prompts([1, 3, 0, 2]), Reference(rho=0.3, own=0.25))


def test_equals_the_explicit_matrix_with_a_threshold_and_layers_of_ones_own():
    check(
        model(), ["cmai(theta=0.5, measured=0, layers=[2])"], prompts([1, 2]), Reference(theta=0.5, measured=0), [0, 2]
    )


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_equals_the_explicit_matrix_in_other_families(name):
    check(family(name), ["cmai"], batch_of(name, "ragged_left"), Reference())


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("before", [[], ["vtc_cls@9"]])
def test_a_second_turn(images, before):
    first = prompts([1, 2])["input_ids"].shape[1]
    second_turn(model(), [*before, "cmai"], images, [1, 2, 3], Reference(turns=(first,)), TOLERANCE)


@pytest.mark.parametrize("off", ["cmai(rho=1)", "cmai(theta=0)", "cmai(layers=[])"])
def test_off_switches_are_stock_bit_for_bit(off):
    batch = prompts([1, 0, 2])
    stock = generated(model(), batch)
    with tokenprune.applied(model(), off):
        assert torch.equal(generated(model(), batch), stock)


def test_rows_of_pictures_and_before_them_and_samples_without_keep_their_bits():
    batch = prompts([1, 0, 1])
    taken = []
    attn = model().model.language_model.layers[2].self_attn
    hook = attn.o_proj.register_forward_pre_hook(lambda m, a: taken.append(a[0]))
    with torch.no_grad():
        model()(**batch)
        with tokenprune.applied(model(), "cmai(layers=[2])") as handle:
            model()(**batch)
            noted = handle.last.noted[0][2]
            assert "measured in layer 1; 36 of 72 image tokens are hidden from decoded tokens" in str(handle.report())
    hook.remove()
    stock, found = taken
    assert torch.equal(found[1], stock[1])
    for row in (0, 2):
        last = int((batch["input_ids"][row] == 5).nonzero()[-1])
        assert torch.equal(found[row, : last + 1], stock[row, : last + 1])
        assert not torch.equal(found[row, last + 1 :], stock[row, last + 1 :])
    assert noted["hidden"].sum(1).tolist() == [18, 0, 18]


def test_a_later_token_changes_nothing_before_it():
    batch = prompts([1])
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, -1] += 1
    with tokenprune.applied(model(), "cmai"), torch.no_grad():
        one, two = model()(**batch).logits, model()(**other).logits
    torch.testing.assert_close(one[:, :-1], two[:, :-1], rtol=1e-5, atol=1e-5)
    assert not torch.equal(one[:, -1], two[:, -1])


def test_assisted_decoding_gives_the_tokens_of_plain_decoding():
    batch = prompts([1])
    with tokenprune.applied(model(), "cmai(rho=0.2)"), torch.no_grad():
        plain = model().generate(**batch, max_new_tokens=8, do_sample=False)
        found = model().generate(**batch, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(found, plain)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("cmai(rho=0)", "rho must be above 0 and at most 1"),
        ("cmai(own=2)", "own must be from 0 and at most 1"),
        ("cmai(theta=-1)", "theta must be a number of at least 0"),
        ("cmai(measured=-1)", "measured must be a decoder layer"),
        ("cmai(measured=2, layers=[1, 3])", "measures in layer 2 and can change the layers behind it"),
    ],
)
def test_what_it_cannot_do_is_refused(method, said):
    with pytest.raises(ValueError, match=said):
        tokenprune.apply(model(), method)
