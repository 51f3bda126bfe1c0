"""GIFT against the explicit matrix, the invariants of its card, and what is refused."""

from __future__ import annotations

import functools

import pytest
import torch
from _families import batch_of, family
from _tiny import prompts, tiny_llava
from interventions.open_attention import generated, open_attention, second_turn
from masked_reference import compare, run_pruned

import tokenprune
from tokenprune.interfaces.intervention import DecoderInfo
from tokenprune.interventions.gift import GIFT, scaled

TOLERANCE = 1e-5  # relative, fp32
ACTING = "gift(alpha=3.0, measured=1, layers=[2, 3])"


@functools.cache
def model(attention: str = "sdpa"):
    return tiny_llava(attention=attention)


class Reference:
    """Steps 3 to 9 of the card; `turns` are places at which further turns begin."""

    def __init__(self, alpha=3.0, beta=1.0, measured=1, skip=(1, 0), cap=None, turns=()):
        self.alpha, self.beta, self.measured, self.skip, self.cap = alpha, beta, measured, skip, cap
        self.turns, self.maps, self.ratios = turns, {}, []

    def __call__(self, row):
        if row.layer == self.measured:
            self.maps[row.sample] = self.measure(row)
            return None
        images, question, saliency, rows = self.maps[row.sample]
        a = row.weights
        out = torch.full_like(a, torch.nan)
        if not len(images) or float(saliency.max()) == 0:
            return None
        half = a.shape[0] // 2
        for i in rows:
            new = a[:, i].clone()
            looks, asks = new[:, images].sum(-1), new[:, question].sum(-1)
            hv, hq = looks.topk(half).indices, asks.topk(half).indices
            before = new[hv][:, images].sum()
            for head in hv:
                new[head, images] *= (self.alpha * saliency).exp()
            ratio = float(new[hv][:, images].sum() / before)
            assert ratio >= 1
            self.ratios.append(ratio)
            ratio = ratio if self.cap is None else min(ratio, self.cap)
            for head in hq:
                new[head, question] *= self.beta * ratio
            out[:, i] = new / new.sum(-1, keepdim=True)
        return out

    def measure(self, row):
        a, total = row.weights, row.logits.shape[1]
        images, question, saliency, rows = [], [], [], []
        starts = [0, *self.turns, row.prompt]
        for begin, end in zip(starts, starts[1:]):
            own = [k for k in range(begin, end) if row.there[k] and row.visual[k]]
            text = [k for k in range(begin, end) if row.there[k] and not row.visual[k]]
            every = [k for k in range(begin, end) if row.visual[k]]
            behind = [k for k in text if every and k > every[-1]]
            if not own:
                rows += text if images else []
                continue
            rows.append(text[-1])
            asked = behind[self.skip[0] : len(behind) - self.skip[1]]
            d = torch.stack([(a[:, i][:, own] - a[:, behind[behind.index(i) - 1]][:, own]).clamp(min=0) for i in asked])
            best = d.sum((0, 2)).topk(a.shape[0] // 2).indices
            m = d[:, best].mean((0, 1))
            m = m.clamp(m.mean() - 3 * m.std(), m.mean() + 3 * m.std())
            saliency.append((m - m.min()) / (m.max() - m.min()))
            images, question = images + own, question + asked
        rows += list(range(row.prompt, total)) if images else []
        return images, question, torch.cat(saliency) if saliency else torch.zeros(1), rows


def check(found, method, batch, rule, layers=(1, 2, 3)):
    run = run_pruned(found, method, None, batch, tokens=4)
    with open_attention(run["adapter"], batch, layers, rule) as worst:
        compare(run, batch, TOLERANCE)
    assert worst[0] < 1e-12 and max(rule.ratios) > 1.5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("images", [[1, 3, 0, 2], [2, 1]])
def test_equals_the_explicit_matrix_in_batches(images, attention):
    check(model(attention), [ACTING], prompts(images), Reference())


@pytest.mark.parametrize(
    ("before", "measured", "skip", "cap"), [("holov@9", 0, (2, 1), 1.2), ("fastv@9", 1, (1, 0), None)]
)
def test_equals_the_explicit_matrix_before_and_behind_cuts(before, measured, skip, cap):
    given = {"method": "gift", "alpha": 2.0, "measured": measured, "layers": [2, 3], "skip": list(skip), "cap": cap}
    rule = Reference(alpha=2.0, measured=measured, skip=skip, cap=cap)
    check(model(), [before, given], prompts([1, 3, 0, 2]), rule, sorted({measured, 2, 3}))


def test_equals_the_explicit_matrix_with_positions_in_three_dimensions():
    check(family("qwen2_5_vl"), [ACTING], batch_of("qwen2_5_vl", "ragged_left"), Reference())


@pytest.mark.parametrize("images", [0, 1])
def test_a_second_turn(images):
    first = prompts([1, 2])["input_ids"].shape[1]
    second_turn(model(), ["vtc_cls@9", ACTING], images, [1, 2, 3], Reference(turns=(first,)), TOLERANCE)


@pytest.mark.parametrize("off", ["gift(alpha=0)", "gift(layers=[])", "gift(skip=[9, 0])"])
def test_off_switches_and_flat_maps_are_stock_bit_for_bit(off):
    batch = prompts([1, 0, 2])
    stock = generated(model(), batch)
    with tokenprune.applied(model(), off):
        assert torch.equal(generated(model(), batch), stock)


def test_rows_but_the_last_and_samples_without_pictures_keep_their_bits():
    batch = prompts([1, 0, 2])
    with torch.no_grad():
        stock = model()(**batch).logits
        with tokenprune.applied(model(), ACTING) as handle:
            found = model()(**batch).logits
            noted = handle.last.noted[0][3]
            assert "alpha 3, beta 1, measured in layer 1; 5.0 question tokens" in str(handle.report())
    assert torch.equal(found[:, :-1], stock[:, :-1]) and torch.equal(found[1], stock[1])
    assert not torch.equal(found[0, -1], stock[0, -1]) and not torch.equal(found[2, -1], stock[2, -1])
    for row in (0, 2):
        saliency = noted["saliency"][row][noted["image"][row]]
        assert float(saliency.min()) == 0 and float(saliency.max()) == 1
    assert not noted["saliency"][1].any()


def test_a_map_is_clipped_and_stretched_and_flat_ones_are_zero():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2, 40, generator=generator)
    values[0, 7], values[1] = 50.0, 0.3
    image = torch.ones(2, 40, dtype=torch.bool)
    image[0, :3] = False
    own = values[0, 3:].double()
    clipped = own.clamp(own.mean() - 3 * own.std(), own.mean() + 3 * own.std())
    found = scaled(values, image)
    torch.testing.assert_close(found[0, 3:].double(), (clipped - clipped.min()) / (clipped.max() - clipped.min()),
                               rtol=1e-5, atol=1e-6)  # fmt: skip
    assert not found[0, :3].any() and not found[1].any()


def test_assisted_decoding_gives_the_tokens_of_plain_decoding():
    batch = prompts([1])
    with tokenprune.applied(model(), ACTING), torch.no_grad():
        plain = model().generate(**batch, max_new_tokens=8, do_sample=False)
        found = model().generate(**batch, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(found, plain)


@pytest.mark.parametrize(
    ("family_name", "text", "layers", "measured", "acting"),
    [("llava", "llama", 32, 11, range(12, 23)), ("llava", "llama", 40, 10, range(14, 21)),
     ("qwen2_vl", "qwen2_vl_text", 28, 9, range(10, 20)), ("other", "llama", 2, 0, range(1, 2))],
)  # fmt: skip
def test_layers_are_the_published_ones_where_there_are_any(family_name, text, layers, measured, acting):
    one = GIFT()
    assert one.prepare(DecoderInfo(family_name, text, 64, layers, 4, 2)) == (measured, *acting)
    assert one._alpha == (4.0 if "qwen" in text else 5.0)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("gift(alpha=-1)", "alpha must be a number of at least 0"),
        ("gift(cap=0.5)", "cap must be a number of at least 1"),
        ("gift(skip=[0, 5])", "skip must be two numbers, the first of at least 1"),
        ("gift(measured=2, layers=[1])", "measures in layer 2 and can change the layers behind it"),
        ("gift(measured=-1)", "measured must be a decoder layer"),
    ],
)
def test_what_it_cannot_do_is_refused(method, said):
    with pytest.raises(ValueError, match=said):
        tokenprune.apply(model(), method)
