"""Published FLOPs figures follow from configs alone: sizes of LLaVA-1.5-7B and LLaVA-NeXT-7B, no weights.

The papers count multiply-adds of the decoder over visual tokens only: `cost.paper_flops`.
"""

from __future__ import annotations

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from tokenprune import cost
from tokenprune.adapters._cost import llava_shape
from tokenprune.interfaces.pruner import ModelDepths
from tokenprune.plan.checks import visual_lengths
from tokenprune.plan.parse import parse_method

SHAPE = llava_shape(
    LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(),
    ),
    has_cls=True,
)  # fmt: skip
LLAVA = ModelDepths(vision=24, feature=22, decoder=32)
ONEVISION = ModelDepths(vision=26, feature=25, decoder=28)


def lengths(method: object, num_tokens: int, depths: ModelDepths = LLAVA, **options: object) -> list[int]:
    """Visual tokens in each layer under a method."""
    stages = parse_method(method, **options).plan(depths, num_tokens)
    return visual_lengths(stages, num_tokens, depths.decoder)


def tera(visual: list[int]) -> float:
    return cost.paper_flops(SHAPE, visual) / 1e12


def schedule(kept: dict[int, int | float]) -> list[dict[str, object]]:
    """A plan that keeps so many tokens from each layer on; 0 is the decoder's input."""
    return [
        {"at": f"layer:{layer}" if layer else "input", "prune": "random", "keep": keep} for layer, keep in kept.items()
    ]


@pytest.mark.parametrize(
    ("num_tokens", "published", "high", "low"), [(576, 3.82, 1.56, 1.19), (2880, 20.83, 8.33, 6.41)]
)
def test_transprunes_schedules_and_the_vanilla_models(num_tokens, published, high, low):
    """arXiv 2507.20630: tokens leave after layers 7, 9 and 12, counted from 1. High is the official code's; Low is our
    reading of the two published figures."""
    assert round(tera([num_tokens] * 32), 2) == published
    found = lengths("transprune@0.125", num_tokens)
    assert found == [num_tokens] * 7 + [num_tokens * 7 // 8] * 2 + [num_tokens * 5 // 8] * 3 + [num_tokens // 8] * 20
    assert round(tera(found), 2) == high
    assert round(tera(lengths("transprune@0.05", num_tokens, schedule="low")), 2) == low


@pytest.mark.parametrize(
    ("layers", "published"),
    [((5, 7, 10), 1.35), ((6, 8, 11), 1.45), ((7, 9, 12), 1.56), ((8, 10, 13), 1.66), ((9, 11, 14), 1.77)],
)
def test_transprunes_ablation_of_layers(layers, published):
    """The five published figures, with cuts one or two layers earlier or later (the layers are inferred from them)."""
    assert round(tera(lengths("transprune@72", 576, layers=layers)), 2) == published


@pytest.mark.parametrize(("first", "last", "published"), [(288, 36, 0.66), (192, 24, 0.44)])
def test_transprune_behind_a_method_at_the_input(first, last, published):
    """The paper's combinations with VisionZip and CDPruner; any method at the input costs the same in the decoder."""
    plan = [
        {"at": "input", "prune": "vtc_cls", "keep": first},
        {"prune": "transprune", "keep": last, "schedule": "combined"},
    ]
    found = lengths(plan, 576)
    assert found == [first] * 7 + [first // 2] * 2 + [first // 4] * 3 + [last] * 20
    assert round(tera(found), 2) == published


def test_transprunes_share_on_qwen2_5_vl_is_that_of_layers_7_9_and_12_of_28():
    """Published: 45.1 % of the FLOPs. Layers in proportion to the depth, 6, 8 and 11, would be 42 %."""
    qwen = ModelDepths(vision=32, feature=31, decoder=28)
    share = cost.equivalent_tokens(lengths("transprune@0.125", 1000, qwen)) / 1000
    assert round(100 * share, 1) == 45.1
    other = cost.equivalent_tokens(lengths("transprune@0.125", 1000, qwen, layers=(6, 8, 11))) / 1000
    assert round(100 * other, 1) == 42.0


def test_transprune_cannot_hold_what_its_layers_do_not_allow():
    assert abs(cost.equivalent_tokens(lengths("transprune@avg192", 576)) - 192) < 1
    with pytest.raises(ValueError, match=r"transprune cannot hold an average of 64 .* goes from 127\.5"):
        lengths("transprune@avg64", 576)


def test_pyramiddrops_published_schedule_is_its_default_at_72_tokens():
    found = lengths("pyramiddrop@72", 576)
    assert found == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert cost.equivalent_tokens(found) == 270


@pytest.mark.parametrize(
    ("first", "second", "third", "mean"),
    [(0.72332, 0.74875, 0.487, 0.5007), (0.26510, 0.98334, 0.87733, 0.2507), (0.11662, 1.0, 0.6011, 0.1000)],
)
def test_vflowopts_shipped_ratios_have_the_published_mean(first, second, third, mean):
    """Ratios of LLaVA-OneVision-7B, each of the tokens that are left: cuts at the input and before layers 9 and 18."""
    plan = schedule({0: first, 9: first * second, 18: first * second * third})
    found = lengths(plan, 100_000, ONEVISION)
    assert cost.equivalent_tokens(found) / 100_000 == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize(("average", "keep"), [(192, 166), (128, 98), (64, 30)])
def test_fastvs_published_averages_give_its_counts(average, keep):
    """K = 2 of 32 layers: (2 N + 30 T) / 32; T = (192 * 32 - 1152) / 30 = 166.4, 98.1 and 29.9."""
    assert lengths("fastv", 576, average=average) == [576] * 2 + [keep] * 30
    assert lengths(f"fastv@avg{average}", 576) == [576] * 2 + [keep] * 30


def test_an_average_is_solved_for_the_one_open_stage_of_a_list():
    plan = [{"at": "input", "prune": "vtc_cls", "keep": 288}, {"at": "layer:9", "prune": "random"}]
    found = lengths(plan, 576, average=128)
    assert found[:9] == [288] * 9 and abs(cost.equivalent_tokens(found) - 128) < 0.5
    share = parse_method("fastv", average=0.25).plan(LLAVA, None)[0].budget.keep
    assert (2 + 30 * share) / 32 == pytest.approx(0.25, abs=1e-3)


def test_an_average_that_cannot_be_held_says_what_can():
    with pytest.raises(ValueError, match="cannot hold an average of 64 .* goes from"):
        lengths("pyramiddrop@avg64", 576)
    with pytest.raises(ValueError, match="no fixed number"):
        parse_method("fastv", average=64).plan(LLAVA, None)
    with pytest.raises(ValueError, match="solved for the one stage that has no keep, and 0"):
        parse_method([{"at": "input", "prune": "random", "keep": 9}], average=64)
    with pytest.raises(ValueError, match="Two budgets were given, avg64 and keep=9"):
        parse_method("fastv@avg64", keep=9)
    with pytest.raises(ValueError, match="no site 'layers:9'"):
        parse_method([{"at": "layers:9", "prune": "random", "keep": 9}])
    with pytest.raises(ValueError, match="K goes from 1 to 31"):
        lengths([{"at": "layer:32", "prune": "random", "keep": 9}], 576)
    with pytest.raises(ValueError, match="Two stages act at 'layer:9'"):
        lengths([{"at": "layer:9", "prune": "random", "keep": 9}, {"at": "layer:9", "prune": "pool", "keep": 9}], 576)
