"""The analytic cost equals what torch counts, for every registered method."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from _tiny import prompts, tiny_llava

from tokenprune import cost
from tokenprune.api import adapter_for, applied
from tokenprune.evals.config.points import Point
from tokenprune.evals.profiling.flops import PARTS, TOLERANCE, cache_bytes, flop_counter, measure_flops
from tokenprune.evals.tasks.load import load_task
from tokenprune.registry import METHODS
from tokenprune.seams import cache_argument, cache_in

OPTIONS = {"quota": (("scores", "uniform"),)}  # it is not told what its frames are worth
VARIANTS = [("oracle", (("fill", "diversity"),)), ("vmtc", (("key_bias", True),)), ("era", (("key_bias", False),))]


@pytest.mark.parametrize(
    ("method", "options"), [("none", ()), *((name, OPTIONS.get(name, ())) for name in METHODS.names()), *VARIANTS]
)
def test_analytic_flops_equal_measured_by_part(method, options, tiny, tiny_task):
    sample = next(load_task(tiny_task).load(0, 1))
    keep = 12 if ("fill", "diversity") in options else 9  # the box alone touches 9, and what fills the rest counts
    point = Point("tiny", "toy", method, None if method == "none" else keep, options=options)
    found = measure_flops(tiny, point, [sample])
    assert found["agree"], found["difference"]
    for part in PARTS:
        assert abs(found["difference"][part]) <= TOLERANCE
    assert abs(found["difference"]["layers"]) <= TOLERANCE
    # the tower works on fewer patches where a method cuts before or inside it; every other method leaves it alone
    sites = set() if method == "none" else {METHODS.get(method).site}
    assert (found["analytic"]["vision"] < found["unpruned"]["vision"]) == bool(sites & {"pixels", "vision"})
    if method != "none":
        share = 0.75 if "layer" in sites else 0.6
        assert found["analytic"]["prefill"] < share * found["unpruned"]["prefill"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_parts_equal_the_counter_without_the_driver(attention):
    model = tiny_llava(attention=attention)
    shape = adapter_for(model).cost_shape()
    batch = prompts([1])
    length = batch["input_ids"].shape[1]
    vision = cost.tower_flops(shape, [shape.image_patches])
    with torch.no_grad(), flop_counter() as counter:
        model.model.vision_tower(batch["pixel_values"])
    assert counter.get_total_flops() == pytest.approx(vision, rel=TOLERANCE)
    with torch.no_grad(), flop_counter() as counter:
        cache = cache_in(model(**batch))
    projector = cost.projector_flops(shape, shape.image_patches)
    prefill = cost.prefill_flops(shape, [length] * shape.layers, logits=length)
    assert counter.get_total_flops() == pytest.approx(vision + projector + prefill, rel=TOLERANCE)
    decode = cost.decode_flops(shape, [length + 1] * shape.layers)
    with torch.no_grad(), flop_counter() as counter:
        model(input_ids=torch.tensor([[9]]), **cache_argument(cache))
    assert counter.get_total_flops() == pytest.approx(decode, rel=TOLERANCE)


def test_kv_bytes_equal_the_tensors_of_a_pruned_cache():
    model = tiny_llava()
    shape = adapter_for(model).cost_shape()
    batch = prompts([1])
    with torch.no_grad(), applied(model, "uniform", keep=9) as handle:
        cache = cache_in(model(**batch))
        report = handle.report()
    lengths = [layer.keys.shape[-2] for layer in cache.layers]
    assert cache_bytes(cache) == cost.kv_bytes_per_layer(shape, lengths, itemsize=4)
    assert report.kv_bytes == sum(cache_bytes(cache))
    assert lengths == [batch["input_ids"].shape[1] - 36 + 9] * shape.layers


def test_lengths_that_shrink_inside_the_decoder():
    shape = adapter_for(tiny_llava()).cost_shape()
    full, short = cost.prefill_flops(shape, [50] * 4), cost.prefill_flops(shape, [20] * 4)
    mixed = cost.prefill_flops(shape, [50, 50, 20, 20])
    assert mixed - cost.head_flops(shape) == pytest.approx((full + short) / 2 - cost.head_flops(shape))
    assert cost.equivalent_tokens([576, 576] + [167] * 30) == pytest.approx(192.56, abs=0.01)
    with pytest.raises(ValueError, match="4 are needed, got 3"):
        cost.prefill_flops(shape, [1, 2, 3])


def test_paper_formula_by_hand():
    shape = adapter_for(tiny_llava()).cost_shape()
    n, d, m = 30, 48, 64
    assert cost.paper_flops(shape, [n] * 4) == 4 * (4 * n * d * d + 2 * n * n * d + 3 * n * d * m)


def test_a_second_turn_attends_to_the_cache():
    shape = adapter_for(tiny_llava()).cost_shape()
    # 10 tokens in one go, or 9 and then 1: linear work is the same, the attention rectangle is 9 x 9 + 1 x 10
    whole = cost.prefill_flops(shape, [9] * 4) + cost.prefill_flops(shape, [1] * 4, cached=[9] * 4)
    assert whole == cost.prefill_flops(shape, [9] * 4) + cost.decode_flops(shape, [10] * 4)


def test_layers_of_several_kinds_by_hand():
    full = cost.LayerShape(linear=100, scores=8, cached=6)
    window = cost.LayerShape(linear=100, scores=8, cached=6, window=4)
    linear = cost.LayerShape(linear=100, scores=0, scanned=1000, convolved=5, state=7, state_fp32=9)
    assert full.flops(10) == 2 * (10 * 100 + 10 * 10 * 8) == window.flops(10)
    # behind ten positions the window's cache holds three, so that a query sees four keys
    assert full.flops(1, 10) - window.flops(1, 10) == 2 * 8 * (11 - 4)
    assert [full.bytes(10, 2), window.bytes(10, 2), window.bytes(2, 2), linear.bytes(10, 2)] == [120, 36, 24, 50]
    assert linear.flops(65) == 2 * (65 * 100 + 66 * 5 + 2 * 1000)
    assert linear.flops(1, 65) == 2 * (100 + 2 * 5)


def test_what_is_not_modelled_is_in_no_sum():
    shape = dataclasses.replace(adapter_for(tiny_llava()).cost_shape(), by_layer=())
    layers = [*shape.layer_shapes()[:3], None]
    partly = dataclasses.replace(shape, by_layer=tuple(layers), projector=None)
    assert cost.layer_flops(partly, [9] * 4)[2:] == [cost.layer_flops(shape, [9] * 4)[2], None]
    assert cost.prefill_flops(partly, [9] * 4) is cost.decode_flops(partly, [9] * 4) is None
    assert (
        cost.projector_flops(partly, 3) is cost.kv_bytes(partly, [9] * 4) is cost.paper_flops(partly, [9] * 4) is None
    )
    headless = dataclasses.replace(shape, vocab=None)
    assert cost.prefill_flops(headless, [9] * 4) is None and cost.kv_bytes(headless, [9] * 4)
    whole = cost.Flops(vision=1, projector=2, selection=3, prefill=4, decode=5)
    assert whole.total == 10 and dataclasses.replace(whole, vision=None).total is None
    assert cost.share(1, None) is cost.share(None, 1) is cost.share(1, 0) is None and cost.share(1, 2) == 0.5
    everywhere = dataclasses.replace(shape, all_logits=True)
    more = cost.prefill_flops(everywhere, [9] * 4) - cost.prefill_flops(shape, [9] * 4)
    assert more == cost.head_flops(shape, 8)
    assert cost.decode_flops(everywhere, [9] * 4) == cost.decode_flops(shape, [9] * 4)
