"""Promise 1 on every family: removal equals masking, for each method that the family can take, on ragged batches of
pictures of different sizes, with padding on either side, and with videos; cells come from the registries."""

from __future__ import annotations

import pytest
import torch
from _families import BUILDERS, KEEP, batch_of, family, layouts, pairs, refusal
from _zoo_all import FAMILIES as ZOO
from _zoo_all import zoo_model
from masked_reference import compare, run_pruned

import tokenprune
from tokenprune.api import adapter_for
from tokenprune.interfaces.budget import Budget, split_budget
from tokenprune.registry import METHODS, MODELS

TOLERANCE = 1e-5  # relative, fp32


def cells() -> list[tuple[str, str, str, str]]:
    """(family, method, layout, attention): SDPA on every layout, eager attention on the ragged one."""
    found = []
    for name, method in pairs(True):
        found += [(name, method, layout, "sdpa") for layout in layouts(name) if not _pooled(name, method, layout)]
        found.append((name, method, "ragged_left", "eager"))
    return found


def _pooled(name: str, method: str, layout: str) -> bool:
    """Whether a method would cut inside the tower what is interpolated or pooled behind it."""
    return (
        name.startswith("llava")
        and (METHODS.get(method).site == "vision" or METHODS.get(method).cuts_pixels)
        and layout.startswith(("mixed", "interpolated"))
    )


def test_every_registered_family_has_a_tiny_model():
    small = set(MODELS.names()) - set(BUILDERS)  # files that say little more than what is read off any model
    assert small - {"generic"} <= set(ZOO) and set(BUILDERS) <= set(MODELS.names())
    assert all(type(zoo_model(name)).__name__ in MODELS.get(name).classes for name in small - {"generic"})
    for name in BUILDERS:
        assert type(family(name)).__name__ in MODELS.get(name).classes


@pytest.mark.parametrize(("name", "method", "layout", "attention"), cells(), ids=lambda value: value)
def test_removal_equals_masking(name, method, layout, attention):
    batch = batch_of(name, layout)
    compare(run_pruned(family(name, attention), method, KEEP, batch, tokens=8), batch, TOLERANCE)


@pytest.mark.parametrize(
    ("name", "method", "layout"),
    [(n, m, layout) for n, m in pairs(True) for layout in layouts(n) if _pooled(n, m, layout)],
)
def test_pictures_that_are_pooled_behind_the_tower_are_not_cut_inside_it(name, method, layout):
    with pytest.raises(ValueError, match="mixed from several places"):
        run_pruned(family(name), method, KEEP, batch_of(name, layout))


@pytest.mark.parametrize(("name", "method"), pairs(False), ids=lambda value: value)
def test_what_a_family_cannot_take_is_refused_before_anything_runs(name, method):
    assert refusal(name, method).endswith("its adapter says so.")
    assert METHODS.get(method).site in ("vision", "pixels")


@pytest.mark.parametrize("name", list(BUILDERS))
def test_keeping_everything_changes_no_bit(name):
    model, batch = family(name), batch_of(name, "ragged_left")
    with torch.no_grad():
        plain = model(**batch).logits
        for method in ("random", "fastv", "pyramiddrop", "transprune"):
            with tokenprune.applied(model, method, 1.0):
                assert torch.equal(model(**batch).logits, plain)
        assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("name", list(BUILDERS))
@pytest.mark.parametrize("method", ["vtc_cls", "fastv", "transprune"])
def test_beams_and_several_answers(name, method):
    """Each beam keeps what its sample keeps, and the best beam is at least as good as greedy."""
    model, batch = family(name), batch_of(name, "one_left")
    with torch.no_grad(), tokenprune.applied(model, method, KEEP) as handle:
        model(**batch)
        kept = handle.kept[0]
        found = model.generate(
            **batch, num_beams=3, num_return_sequences=2, max_new_tokens=6, do_sample=False, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert found.sequences.shape[0] == 2 and len(handle.kept) == 3
        for row in handle.kept:
            assert all(torch.equal(a, b) for a, b in zip(row, kept))
        greedy = model.generate(
            **batch, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    tokens = greedy.sequences[:, batch["input_ids"].shape[1] :]
    score = torch.stack(greedy.logits, 1).log_softmax(-1).gather(2, tokens[..., None]).mean()
    assert found.sequences_scores[0] >= score - 1e-5


def test_stages_compose_on_every_family():
    plan = [
        {"at": "input", "prune": "random", "keep": 20},
        {"at": "layer:2", "prune": "divprune", "keep": 10},
        {"at": "layer:3", "prune": "fastv", "keep": 4},
    ]
    for name in BUILDERS:
        batch = batch_of(name, "ragged_left")
        run = run_pruned(family(name), plan, None, batch, tokens=6)
        compare(run, batch, TOLERANCE)
        report, images = run["report"], len(run["layout"].spans)
        assert report.visual_by_layer == (20 * images, 20 * images, 10 * images, 4 * images)
        assert report.equivalent_tokens == 13.5 * images


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "qwen2_5_vl", "smolvlm"])
@pytest.mark.parametrize("scope", ["raster", "visual"])
def test_a_method_may_rank_crops_and_frames_alone_or_together(name, scope):
    layout = "mixed_left" if name == "qwen2_5_vl" else "ragged_left"
    batch = batch_of(name, layout)
    run = run_pruned(family(name), "vtc_cls", 0.25, batch, tokens=4, scope=scope)
    compare(run, batch, TOLERANCE)
    for span in run["layout"].spans:
        kept = run["kept"][span.sample][span.image]
        assert len(kept) == Budget(0.25).tokens(span.num_tokens), "the whole visual keeps its budget either way"
        if scope == "raster" and span.num_tokens:
            shares = split_budget(len(kept), [raster.num_tokens for raster in span.visual.rasters])
            for raster, share in zip(span.visual.rasters, shares):
                inside = (kept >= raster.start) & (kept < raster.start + raster.num_tokens)
                assert int(inside.sum()) == share


def test_a_method_of_the_grid_cannot_rank_together():
    with pytest.raises(ValueError, match="works on a grid"):
        tokenprune.apply(family("llava_next"), "uniform@9", scope="visual")
    with pytest.raises(ValueError, match="scope must be"):
        tokenprune.apply(family("llava_next"), "random@9", scope="crop")


@pytest.mark.parametrize("name", [n for n in BUILDERS if adapter_for(family(n)).vision.can_cut])
@pytest.mark.parametrize("layout", ["ragged_left", "mixed_left"])
def test_any_method_can_cut_inside_the_tower_and_again_later(name, layout):
    if layout not in layouts(name) or (layout == "mixed_left" and name.startswith("llava")):
        pytest.skip("this family has no such batch, or pools its videos behind the tower")
    plan = [
        {"at": "vision:0", "prune": "random", "keep": 14},
        {"at": "input", "prune": "divprune", "keep": 10},
        {"at": "layer:2", "prune": "random", "keep": 5},
    ]
    batch = batch_of(name, layout)
    run = run_pruned(family(name), plan, None, batch, tokens=6)
    compare(run, batch, TOLERANCE)
    assert run["report"].visual_by_layer[-1] == 5 * len(run["layout"].spans)


@pytest.mark.parametrize("name", list(BUILDERS))
@pytest.mark.parametrize("method", ["none", "divprune", "fastv", "transprune", "flowcut", "downsample", "vflowopt"])
def test_analytic_flops_equal_measured_by_part_and_layer(name, method):

    from tokenprune.evals.profiling.flops import TOLERANCE as NEAR
    from tokenprune.evals.profiling.flops import count_once

    model, batch = family(name), batch_of(name, "one_left")
    try:
        handle = tokenprune.apply(model, "random" if method == "none" else method, 1.0 if method == "none" else KEEP)
    except ValueError:
        pytest.skip("refused")
    with handle:
        found = count_once(adapter_for(model), batch)
        model(**batch)
        report = handle.report()
    counted = report.flops.as_dict()
    for part in ("vision", "projector", "selection", "prefill", "decode"):
        assert counted[part] == pytest.approx(found[part], rel=NEAR), part
    for layer, flops in enumerate(report.flops_by_layer):
        assert flops == pytest.approx(found[f"layer:{layer}"], rel=NEAR), layer
    assert report.kv_bytes > 0 and (method == "none") == (report.flops == report.flops_unpruned)


def test_the_adapter_of_each_family_is_found_by_class():
    for name in BUILDERS:
        assert adapter_for(family(name)).name == name


@pytest.mark.parametrize("size", [(4, 60), (60, 4)])
def test_a_strip_whose_mosaic_is_all_padding_is_pruned(size):
    model, batch = family("llava_next"), dict(batch_of("llava_next", "one_left"))
    batch["image_sizes"] = torch.tensor([size])
    with torch.no_grad():
        features = model.model.get_image_features(batch["pixel_values"], batch["image_sizes"], return_dict=True)
    token, ids = model.config.image_token_id, batch["input_ids"][0]
    begin, text = int((ids == token).nonzero()[0]), ids[ids != token]
    image = torch.full((features.pooler_output[0].shape[0],), token)
    batch["input_ids"] = torch.cat([text[:begin], image, text[begin:]])[None]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with tokenprune.applied(model, "random", keep=5) as handle, torch.no_grad():
        logits = model(**batch).logits
    assert logits.shape[1] == len(text) + 5 and len(handle.kept[0][0]) == 5
