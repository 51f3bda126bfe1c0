"""ACT against the explicit matrix, the invariants of its card, and what is refused."""

from __future__ import annotations

import functools

import pytest
import torch
from _families import batch_of, family
from _tiny import prompts, tiny_llava
from interventions.open_attention import generated, open_attention, second_turn
from masked_reference import compare, run_pruned

import tokenprune

TOLERANCE = 1e-5  # relative, fp32
ACTING = "act(theta=0.06, layers=[1, 2, 3])"


@functools.cache
def model(attention: str = "sdpa"):
    return tiny_llava(attention=attention)


class Reference:
    """Steps 1 to 5 of the card, with a loop over heads and rows; `turns` are places at which further turns begin, and
    `pictures` says of each turn whether it brings facts."""

    def __init__(self, beta=0.4, theta=0.06, heads=range(4), turns=(), pictures=(True,)):
        self.beta, self.theta, self.heads, self.turns, self.pictures = beta, theta, heads, turns, pictures
        self.sinks = self.columns = 0

    def __call__(self, row):
        a, out = row.weights, row.weights.clone()
        starts = [0, *self.turns, row.prompt]
        for head in self.heads:
            sinks = []
            for begin, end, brings in zip(starts, starts[1:], self.pictures):
                there = [k for k in range(begin, end) if row.there[k]]
                theta = max(0.02, 5 / int(row.there[:end].sum())) if self.theta is None else self.theta
                for number, k in enumerate(there):
                    rows = [i for i in there if float(row.logits[head, i, k]) > float("-inf")]  # those that see it
                    mean = sum(float(a[head, i, k]) for i in rows) / len(rows)
                    protected = begin == 0 and number == 0
                    if brings and len(rows) >= 8 and mean > theta and not protected:
                        sinks.append(k)
                self.columns += len(there)
            self.sinks += len(sinks)
            s = torch.zeros(a.shape[-1], dtype=torch.bool).index_fill(0, torch.tensor(sinks, dtype=torch.long), True)
            freed = (1 - self.beta) * a[head][:, s].sum(-1, keepdim=True)
            rest = a[head][:, ~s].sum(-1, keepdim=True)
            out[head][:, s] = self.beta * a[head][:, s]
            out[head][:, ~s] = a[head][:, ~s] * (1 + freed / rest)
        return out


def check(found, method, batch, rule, layers=(1, 2, 3)):
    run = run_pruned(found, method, None, batch, tokens=4)
    with open_attention(run["adapter"], batch, layers, rule) as worst:
        compare(run, batch, TOLERANCE)
    assert worst[0] < 1e-12 and 0 < rule.sinks < rule.columns


@pytest.mark.parametrize(("images", "side"), [([1, 3, 0, 2], "right"), ([2, 1], "left")])
def test_equals_the_explicit_matrix_in_batches(images, side):
    check(model(), [ACTING], prompts(images, side), Reference())


def test_equals_the_explicit_matrix_in_eager_attention_with_the_threshold_of_its_own():
    rule = Reference(beta=0.0, theta=None)
    check(model("eager"), ["act(beta=0, layers=[1, 2, 3])"], prompts([1, 1]), rule)


@pytest.mark.parametrize("before", ["holov@9", "fastv@9"])
def test_equals_the_explicit_matrix_on_pruned_prompts_in_some_heads(before):
    check(model(), [before, "act(theta=0.06, layers=[1, 3], heads=[0, 3])"], prompts([1, 3, 0]),
          Reference(heads=[0, 3]), [1, 3])  # fmt: skip


def test_equals_the_explicit_matrix_with_positions_in_three_dimensions():
    check(family("qwen2_5_vl"), [ACTING], batch_of("qwen2_5_vl", "ragged_left"), Reference())


@pytest.mark.parametrize("images", [0, 1])
def test_a_second_turn(images):
    first = prompts([1, 2])["input_ids"].shape[1]
    rule = Reference(turns=(first,), pictures=(True, bool(images)))
    second_turn(model(), ["vtc_cls@9", ACTING], images, [1, 2, 3], rule, TOLERANCE)


@pytest.mark.parametrize("off", ["act(beta=1)", "act(theta=1)", "act(heads=[])", "act(layers=[])"])
def test_off_switches_are_stock_bit_for_bit(off):
    batch = prompts([1, 0, 2])
    stock = generated(model(), batch)
    with tokenprune.applied(model(), off):
        assert torch.equal(generated(model(), batch), stock)


def test_heads_that_are_not_listed_and_the_first_key_are_left_alone():
    batch, taken = prompts([1]), []
    attn = model().model.language_model.layers[1].self_attn
    hook = attn.o_proj.register_forward_pre_hook(lambda m, a: taken.append(a[0].unflatten(-1, (-1, attn.head_dim))))
    with torch.no_grad():
        model()(**batch)
        with tokenprune.applied(model(), "act(theta=0.03, layers=[1], heads=[2])") as handle:
            model()(**batch)
            sinks = handle.last.noted[0][1]["sinks"]
            assert "sinks per prompt, layer and head" in str(handle.report())
    hook.remove()
    stock, found = taken
    assert torch.equal(found[:, :, [0, 1, 3]], stock[:, :, [0, 1, 3]])
    assert not torch.equal(found[:, :, 2], stock[:, :, 2]) and torch.equal(found[:, 0], stock[:, 0])
    assert sinks[:, :, 2].any() and not sinks[:, :, [0, 1, 3]].any() and not sinks[:, 0].any()
    assert not sinks[:, -7:].any(), "columns that fewer than 8 rows see"


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("act(beta=2)", "beta must be in"),
        ("act(theta=-1)", "theta must be in"),
        ("act(heads=[7])", "heads name 7, and this decoder has query heads 0 to 3"),
        ("act(layers=[4])", "act shall act in layer 4"),
    ],
)
def test_what_it_cannot_do_is_refused(method, said):
    with pytest.raises(ValueError, match=said):
        tokenprune.apply(model(), method)
