"""The ideal prefill really is the pruned prefill without its overhead, and times are where they should be."""

from __future__ import annotations

import pytest
import torch

from tokenprune.api import applied
from tokenprune.evals.config.measure import Measure
from tokenprune.evals.config.points import Point
from tokenprune.evals.profiling.timing import ideal_prefill, measure_times, prefill
from tokenprune.evals.tasks.load import load_task
from tokenprune.seams import cache_in


def test_ideal_computes_what_the_pruned_model_computes(tiny, tiny_task):
    sample = next(load_task(tiny_task).load(0, 1))
    inputs = dict(tiny.inputs([sample.question], [sample.image]))
    with torch.inference_mode():
        with applied(tiny.model, "uniform", keep=9, positions="compact") as handle:
            pruned = prefill(tiny, inputs)
            stays = handle.stays
        ideal = ideal_prefill(tiny, inputs, stays)()
    torch.testing.assert_close(ideal.logits, pruned.logits, atol=1e-5, rtol=1e-5)
    assert cache_in(ideal).get_seq_length() == inputs["input_ids"].shape[1] - 36 + 9


@pytest.mark.parametrize(("method", "options"), [("fastv", {"layer": 1}), ("pyramiddrop", {"layers": [1, 2]})])
def test_layers_of_the_ideal_see_the_counts_of_the_pruned_run(method, options, tiny, tiny_task):
    """Positions are kept, so the ideal's are those of the pruned run, and it must say the same."""
    sample = next(load_task(tiny_task).load(0, 1))
    inputs = dict(tiny.inputs([sample.question], [sample.image]))
    with torch.inference_mode():
        with applied(tiny.model, method, keep=9, positions="keep", **options) as handle:
            pruned = prefill(tiny, inputs)
            stays, by_layer = handle.stays_by_layer, handle.visual_by_layer[0]
        ideal = ideal_prefill(tiny, inputs, stays)
        first, second = ideal(), ideal()
        plain = prefill(tiny, inputs)
    lengths = [layer.keys.shape[-2] for layer in cache_in(first).layers]
    assert lengths == [layer.keys.shape[-2] for layer in cache_in(pruned).layers]
    text = inputs["input_ids"].shape[1] - 36
    assert lengths == [count + text for count in by_layer] and len(set(lengths)) > 1
    torch.testing.assert_close(first.logits, pruned.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(first.logits, second.logits)
    assert not torch.allclose(plain.logits, pruned.logits, atol=1e-5), "hooks are gone, and pruning changes something"
    assert all(layer.keys.shape[-2] == text + 36 for layer in cache_in(plain).layers)


@pytest.mark.parametrize("method", ["none", "vtc_cls"])
def test_every_time_is_there(method, tiny, tiny_task):
    samples = list(load_task(tiny_task).load(0, 2))
    measure = Measure(samples=2, repeats=3, warmup=1, decode_tokens=2)
    found = measure_times(tiny, Point("tiny", "toy", method, None if method == "none" else 9), samples, measure)
    times = found["times"]
    assert times["prefill"]["n"] == 6 and times["decode"]["n"] == 4
    assert all(0 < entry["q25"] <= entry["median"] <= entry["q75"] for entry in times.values())
    assert ("to_ideal" in times) == (method != "none")
    assert found["kv"]["measured"] == found["kv"]["analytic"]
    assert found["kv"]["equivalent_tokens"] == (36 if method == "none" else 9)
    assert "get_image_features" not in vars(tiny.model.model), "the method is to be removed again"


@pytest.mark.pocket
def test_the_ideal_encodes_pictures_and_videos_of_one_prompt():
    """A tower that the ideal leaves out would make every method look slow beside it."""
    from PIL import Image

    from tokenprune.api import applied
    from tokenprune.evals.models.load import load_model
    from tokenprune.evals.profiling.flops import flop_counter
    from tokenprune.evals.profiling.timing import ideal_prefill

    loaded = load_model("pocket-qwen")
    red, blue = Image.new("RGB", (96, 64), "red"), Image.new("RGB", (160, 224), "blue")
    inputs = dict(loaded.inputs(["what?"], [([red] * 4, blue)]))
    assert len(loaded.adapter.pixels) == 2 and all(name in inputs for name in loaded.adapter.pixels.values())
    with torch.inference_mode(), applied(loaded.model, "random", keep=0.5) as handle:
        with flop_counter() as pruned:
            loaded.model(**inputs, use_cache=True, logits_to_keep=1)
        stays = handle.stays_by_layer
    run = ideal_prefill(loaded, inputs, stays)
    with torch.inference_mode(), flop_counter() as ideal:
        run()
    assert ideal.get_total_flops() == pytest.approx(pruned.get_total_flops(), rel=1e-3)
