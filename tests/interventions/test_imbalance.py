"""Imbalance against the explicit matrix, the invariants of its card, and what is refused."""

from __future__ import annotations

import functools

import pytest
import torch
from _families import batch_of, family
from _tiny import prompts, tiny_llava
from interventions.open_attention import generated, open_attention, second_turn
from masked_reference import compare, run_pruned

import tokenprune
from tokenprune.interventions.imbalance import chosen

TOLERANCE = 1e-5  # relative, fp32


@functools.cache
def model(attention: str = "sdpa"):
    return tiny_llava(attention=attention)


def tower_scores(adapter, batch):
    """c1 and c2 of each picture of the batch, `[M, N]` each, from an eager tower's own maps."""
    tower = adapter.model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = tower(batch["pixel_values"], output_attentions=True).attentions
    finally:
        tower.set_attn_implementation(before)
    return [one[:, :, 0, 1:].double().mean(1) for one in (maps[0], maps[len(maps) - 2])]


class Reference:
    """Steps 1 to 7 of the card; the groups of a picture stand at its places, in the order of the row."""

    def __init__(self, scores, per_sample, alpha=0.7, beta=0.3, ratio=0.25, modulated=False, turns=()):
        self.alpha, self.beta, self.modulated, self.turns = alpha, beta, modulated, turns
        self.groups, at, self.counts = [], 0, [0, 0]
        for count in per_sample:
            own = [self.of_picture(c1, c2, ratio) for c1, c2 in zip(*(s[at : at + count] for s in scores))]
            self.groups.append(torch.cat(own) if own else torch.zeros(0))
            at += count
        self.odds = 0

    def of_picture(self, c1, c2, ratio):
        groups = torch.zeros(len(c1))
        groups[c1.topk(int(ratio * len(c1))).indices] = 1
        q1, q3 = (torch.quantile(c2, q) for q in (0.25, 0.75))
        groups[c2 > q3 + 1.5 * (q3 - q1)] = 2
        self.counts = [self.counts[k] + int((groups == k + 1).sum()) for k in (0, 1)]
        return groups

    def __call__(self, row):
        total = row.logits.shape[1]
        groups = torch.zeros(total, dtype=torch.float64)
        groups[row.visual] = self.groups[row.sample].double()
        if not groups.any():
            return None
        strength = torch.where(groups == 1, self.alpha, torch.where(groups == 2, self.beta, 0.0))
        out = torch.full_like(row.logits, torch.nan)
        for i in self.rows(row):
            s, own = row.logits[:, i], strength.expand(row.logits.shape[0], -1)
            if self.modulated:
                looks = row.weights[:, i][:, row.visual].sum(-1)
                own = own * (looks / looks.mean()).clamp(0.5, 1.5)[:, None]
            seen = s > float("-inf")
            out[:, i] = torch.where(seen, s + own * torch.where(seen, s, 0.0).abs(), s).softmax(-1)
        return out

    def rows(self, row):
        starts, rows, pictures = [0, *self.turns, row.prompt], [], False
        for begin, end in zip(starts, starts[1:]):
            text = [k for k in range(begin, end) if row.there[k] and not row.visual[k]]
            new = bool(row.visual[begin:end].any())
            rows += text[-1:] if new else text if pictures else []
            pictures |= new
        return rows + list(range(row.prompt, row.logits.shape[1]))


def check(found, method, images, layers=(2, 3), **more):
    batch = prompts(images)
    run = run_pruned(found, method, None, batch, tokens=4)
    rule = Reference(tower_scores(run["adapter"], batch), images, **more)
    with open_attention(run["adapter"], batch, layers, rule) as worst:
        compare(run, batch, TOLERANCE)
    assert worst[0] < 1e-12 and min(rule.counts) > 0, "local and summary tokens"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_the_explicit_matrix_in_batches(attention):
    check(model(attention), ["imbalance"], [1, 3, 0, 2])


@pytest.mark.parametrize("before", ["holov@9", "fastv@9"])
def test_equals_the_explicit_matrix_on_pruned_prompts_by_head(before):
    check(model(), [before, "imbalance(layers=[1, 3], head_modulation=true, beta=0.5)"], [1, 3, 0, 2], (1, 3),
          modulated=True, beta=0.5)  # fmt: skip


@pytest.mark.parametrize("images", [0, 1])
def test_a_second_turn(images):
    first, second = prompts([1, 2]), prompts([images, images], seed=9)
    pixels = [first["pixel_values"][:1], first["pixel_values"][1:]]
    if images:
        pixels = [pixels[0], second["pixel_values"][:1], pixels[1], second["pixel_values"][1:]]
    with tokenprune.applied(model(), "random", 1.0) as handle:
        scores = tower_scores(handle.adapter, {"pixel_values": torch.cat(pixels)})
    rule = Reference(scores, [1 + images, 2 + images], turns=(first["input_ids"].shape[1],))
    second_turn(model(), ["vtc_cls@9", "imbalance"], images, [2, 3], rule, TOLERANCE)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_rows_but_the_last_keep_their_bits_in_other_families_and_the_question_changes_no_set(name):
    found, batch = family(name), batch_of(name, "ragged_left")
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, -1] += 1
    with torch.no_grad():
        stock = found(**batch).logits
        with tokenprune.applied(found, "imbalance") as handle:
            changed, groups = found(**batch).logits, handle.last.noted[0][2]["groups"]
            found(**other)
            assert torch.equal(handle.last.noted[0][2]["groups"], groups) and bool(groups.any())
    assert torch.equal(changed[:, :-1], stock[:, :-1]) and not torch.equal(changed[:, -1], stock[:, -1])


@pytest.mark.parametrize("off", ["imbalance(alpha=0, beta=0)", "imbalance(layers=[])"])
def test_off_switches_are_stock_bit_for_bit(off):
    batch = prompts([1, 0, 2])
    stock = generated(model(), batch)
    with tokenprune.applied(model(), off):
        assert torch.equal(generated(model(), batch), stock)


def test_sets_of_a_grid():
    early, late = torch.arange(40.0), torch.ones(40)
    late[:20] += torch.linspace(0, 0.2, 20)
    flat = chosen(early, late, 0.25, 1.5)
    assert (flat == 1).nonzero()[:, 0].tolist() == list(range(30, 40)) and not bool((flat == 2).any())
    late[[3, 35]] = 9.0
    both = chosen(early, late, 0.25, 1.5)
    assert (both == 2).nonzero()[:, 0].tolist() == [3, 35] and int((both == 1).sum()) == 9


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("imbalance(alpha=-1)", "alpha must be a number of at least 0"),
        ("imbalance(ratio=2)", "ratio is a share"),
        (["flowcut@9", "imbalance"], "reads whole pictures off the vision tower, and flowcut takes tokens"),
    ],
)
def test_what_it_cannot_do_is_refused(method, said):
    with pytest.raises(ValueError, match=said):
        tokenprune.apply(model(), method)
