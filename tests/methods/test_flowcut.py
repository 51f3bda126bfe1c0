"""FlowCut: its schedule, its score against the definition, and the invariants of its card."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from _forward import forward
from _tiny import prompts, tiny_llava
from _views import make_view
from hypothesis import given
from hypothesis import strategies as st
from masked_reference import relative_error

import tokenprune
from tokenprune.api import adapter_for
from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths
from tokenprune.interfaces.signals import CLS_ATTENTION, CLS_VALUE_SIMILARITY, VALUE_NORM, Signal, TowerInfo
from tokenprune.methods.flowcut import FlowCut, drop_count, entropy_ratio

CLIP = TowerInfo(num_layers=24, feature_layer=22, has_cls=True, num_heads=16, hidden_size=1024)


def test_cuts_stand_after_every_second_block_and_the_last_before_the_feature_block():
    stages = FlowCut().stages(Budget(64), ModelDepths(vision=24, feature=22, decoder=32))
    assert [stage.depth for stage in stages] == list(range(1, 22, 2))
    scored = [block for stage in stages for block in FlowCut().blocks(stage.depth, CLIP)]
    assert scored == list(range(22)), "the running score takes every block up to the last cut, once"


@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 20), st.floats(0, 1))
def test_the_count_never_passes_the_target(num_tokens, target, left, ratio):
    if target > num_tokens:
        return
    gone = drop_count(num_tokens, target, left, ratio)
    assert 0 <= gone <= num_tokens - target
    if left == 0:
        assert gone == num_tokens - target
    elif ratio == 1:
        assert gone == 0, "even attention drops nothing before the last cut"
    elif ratio == 0:
        assert gone == min(round((num_tokens - target) / math.sqrt(left)), num_tokens - target)


def test_the_entropy_ratio_of_even_and_one_hot_rows():
    rows = torch.stack([torch.full((50,), 1 / 50), torch.eye(50)[3]])
    assert entropy_ratio(rows).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert not entropy_ratio(rows.half()).isnan().any(), "0 ln 0 is 0 in half precision too"


def test_the_cards_illustration():
    """Lengths for a ratio that falls by .019 a block from .99, for T = 64 and T = 192 (card)."""
    for target, expected in (
        (64, [569, 554, 530, 497, 456, 408, 353, 294, 230, 159, 64]),
        (192, [571, 559, 541, 516, 485, 449, 408, 364, 316, 263, 192]),
    ):
        count, found = 576, []
        for block in range(1, 22, 2):
            count -= drop_count(count, target, 21 - block, 0.99 - 0.019 * block)
            found.append(count)
        assert found == pytest.approx(expected, abs=1)


def test_signals_equal_the_definition():
    """Rows of [CLS], value similarity and value norm of a block, against its attention computed in the open."""
    model, batch = tiny_llava(attention="eager"), prompts([2])
    tower = model.model.vision_tower
    with torch.no_grad():
        attention = tower(batch["pixel_values"], output_attentions=True).attentions[0]
        seen = {}
        block = tower.encoder.layers[0].self_attn
        hook = block.v_proj.register_forward_hook(lambda m, a, out: seen.update(v=out))
        tower(batch["pixel_values"])
        hook.remove()
        value = seen["v"].unflatten(-1, (4, -1)).transpose(1, 2)
        similar = (value[:, :, :1] @ value.transpose(2, 3)).softmax(-1).mean(1)[:, 0, 1:]
        norm = value.mean(1).abs().sum(-1)[:, 1:]
        expected = {CLS_ATTENTION: attention.mean(1)[:, 0, 1:], CLS_VALUE_SIMILARITY: similar, VALUE_NORM: norm}
        with tokenprune.applied(model, "flowcut@9") as handle:
            features = model.model.get_image_features(batch["pixel_values"], return_dict=True)
            recording = features.pooler_output[0]._tokenprune_source[0]
        assert handle.adapter.name == "llava"
    for name, truth in expected.items():
        found = torch.stack([recording.signals[Signal(name, 0)][row] for row in range(2)])
        assert relative_error(found, truth) < 1e-5, name


def test_the_score_is_the_definition_and_the_running_mean_of_a_constant_is_the_constant():
    method, tower = FlowCut(), dataclasses.replace(CLIP, num_layers=6, feature_layer=4)
    view = make_view(method, tower=tower, budget=7)
    block = tower.feature_layer - 1
    a, m = view.signal(CLS_ATTENTION, block), view.signal(CLS_VALUE_SIMILARITY, block)
    truth = (a / a.sum(1, keepdim=True) + m / m.sum(1, keepdim=True)) * view.signal(VALUE_NORM, block)
    torch.testing.assert_close(method.block_score(view, block), truth)
    scaled = {s: v * (3.0 if s.name == CLS_ATTENTION else 1.0) for s, v in view.signals.items()}
    torch.testing.assert_close(method.block_score(dataclasses.replace(view, signals=scaled), block), truth)
    same = {s: view.signals[Signal(s.name, block)] for s in view.signals}
    constant = dataclasses.replace(view, signals=same, carry={"flowcut": truth})
    torch.testing.assert_close(method.select(constant).carry["flowcut"], truth)


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_a_row_without_weight_counts_as_even(variant):
    """The value row of [CLS], or its attention, is 0 in fp32 for all patches: the others go on ranking."""
    method, tower = FlowCut(variant=variant), dataclasses.replace(CLIP, num_layers=6, feature_layer=4)
    view = make_view(method, tower=tower, budget=7)
    block = tower.feature_layer - 1
    attending, similar = method._attending(tower), str(method._similar(tower))
    for dead in ({similar}, {attending}, {attending, similar}):
        signals = {s: v * 0 if s.name in dead else v for s, v in view.signals.items()}
        empty = dataclasses.replace(view, signals=signals)
        even = torch.full_like(view.signal(VALUE_NORM, block), 1 / view.num_tokens)
        rows = [even if name in dead else view.signal(name, block) for name in (attending, similar)]
        truth = sum(row / row.sum(1, keepdim=True) for row in rows) * view.signal(VALUE_NORM, block)
        torch.testing.assert_close(method.block_score(empty, block), truth)
        kept = method.select(empty).indices
        assert kept.shape[1] == 7 and all(len(set(row)) == 7 for row in kept.tolist())
    broken = {s: v * float("nan") if s.name == similar else v for s, v in view.signals.items()}
    with pytest.raises(ValueError, match="hold NaN"):
        method.select(dataclasses.replace(view, signals=broken))


def test_a_model_whose_cls_is_like_itself_alone_is_cut():
    """exp(-v v) underflows for every patch where the value of [CLS] is long and no other is."""
    model, batch = tiny_llava(vision_layers=8), prompts([1, 2])
    with torch.no_grad():
        for layer in model.model.vision_tower.encoder.layers:
            layer.self_attn.v_proj.weight.zero_()
            layer.self_attn.v_proj.bias.zero_()

        def long(module, args, output):
            output = output + 1e-3 * torch.arange(output.shape[1])[:, None]
            output[:, 0] = 40.0
            return output

        hooks = [e.self_attn.v_proj.register_forward_hook(long) for e in model.model.vision_tower.encoder.layers]
        with tokenprune.applied(model, "flowcut@5") as handle:
            model(**batch)
            assert all(len(image) == 5 for images in handle.kept for image in images)
        for hook in hooks:
            hook.remove()


def test_survivors_are_nested_and_exactly_t_and_the_tower_runs_on_them():
    model, batch = tiny_llava(vision_layers=8), prompts([1, 2])
    with tokenprune.applied(model, "flowcut@5") as handle, torch.no_grad():
        model(**batch)
        work = handle.last.tower[0]
        kept = [image for images in handle.kept for image in images]
        report = handle.report()
    assert all(len(image) == 5 and image.tolist() == sorted(set(image.tolist())) for image in kept)
    before = [set(range(36))] * 3
    for block, alive in work.cuts:
        assert block % 2 == 1 and block <= 5  # 8 blocks, features of block 6
        now = [set(range(36)) if a is None else set(a.tolist()) for a in alive]
        assert all(a <= b for a, b in zip(now, before))
        before = now
    assert [set(image.tolist()) for image in kept] == before
    assert (
        report.flops.vision < report.flops_unpruned.vision and report.flops.projector < report.flops_unpruned.projector
    )


def test_an_image_is_cut_alike_alone_and_in_any_batch():
    model, batch = tiny_llava(vision_layers=8), prompts([1, 1, 1])
    with tokenprune.applied(model, "flowcut@5") as handle, torch.no_grad():
        model(**batch)
        together = handle.kept
        for row in range(3):
            model(**{key: value[row : row + 1] for key, value in batch.items()})
            assert torch.equal(handle.kept[0][0], together[row][0])


def test_the_selection_does_not_depend_on_the_prompt_or_the_attention_kernel():
    batch, other = prompts([2], seed=1), prompts([2], seed=7)
    other["pixel_values"] = batch["pixel_values"]
    kept = []
    for attention, inputs in (("sdpa", batch), ("sdpa", other), ("eager", batch)):
        model = tiny_llava(attention=attention)
        with tokenprune.applied(model, "flowcut@5") as handle, torch.no_grad():
            model(**inputs)
            kept.append(torch.stack(handle.kept[0]))
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])


def test_a_budget_of_all_patches_cuts_nothing():
    model, batch = tiny_llava(), prompts([1])
    with torch.no_grad():
        plain = model(**batch).logits
        with tokenprune.applied(model, "flowcut", keep=36) as handle:
            assert torch.equal(model(**batch).logits, plain) and len(handle.kept[0][0]) == 36


def test_towers_without_cls_have_no_value_term_and_say_so():
    without = dataclasses.replace(CLIP, has_cls=False)
    names = {signal.name for signal in FlowCut().signals_at(without, "vision", 3)}
    assert names == {"mean_query_attention", VALUE_NORM}
    assert "extension" in FlowCut().notes(without)[0] and not FlowCut().notes(CLIP)
    assert adapter_for(tiny_llava()).tower.has_cls


def test_bad_options_are_refused():
    for options, text in (({"history": 1.0}, "history must be"), ({"interval": 0}, "interval must be")):
        with pytest.raises(ValueError, match=text):
            FlowCut(**options)
    with pytest.raises(ValueError, match="cuts inside the vision tower"):
        tokenprune.apply(tiny_llava(), {"at": "layer:2", "prune": "flowcut", "keep": 9})


@pytest.mark.parametrize("keep", [1, 5, 20])
@pytest.mark.parametrize("site", ["vision:0", "vision:1", "vision:2", "vision:5"])
def test_flowcut_at_a_site_of_ones_own_keeps_its_budget(site, keep):
    model = tiny_llava(vision_layers=8)
    handle, _ = forward(model, prompts([1, 2]), {"at": site, "prune": "flowcut", "keep": keep})
    assert {len(kept) for row in handle.kept for kept in row} == {keep} and len(handle.stages) == 1
    with pytest.raises(ValueError, match="has no meaning beside at="):
        tokenprune.apply(model, {"at": site, "prune": "flowcut", "text_stage": False, "keep": keep})
