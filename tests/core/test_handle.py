"""Promise 2: nothing is kept back: the model is what it was, keeping all changes no bit, errors leave it usable."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from _forward import forward
from _tiny import prompts, tiny_llava
from masked_reference import compare, example_hints, run_pruned

import tokenprune
from tokenprune.engine.tower_pass import TowerPass
from tokenprune.registry import METHODS
from tokenprune.seams import cache_in
from tokenprune.state.forward_call import ForwardCall
from tokenprune.state.tower_recording import Recording

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs",
         "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")  # fmt: skip


@functools.cache
def model():
    found = tiny_llava()
    logits(found, prompts([1]))  # transformers installs its own output hooks at the first call
    return found


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def fingerprint(model):
    """Everything that a patch could leave behind: hooks, types, attributes, methods of every module."""
    found = {}
    for name, module in model.named_modules():
        found[name] = (
            type(module),
            frozenset(module.__dict__),
            tuple(tuple(getattr(module, hook)) for hook in HOOKS),
            module.forward.__func__,
            getattr(getattr(module, "get_image_features", None), "__func__", None),
            tuple((key, id(value)) for key, value in module._parameters.items()),
        )
    return found


@pytest.mark.parametrize("name", METHODS.names())
def test_remove_gives_back_the_same_model(name):
    batch = prompts([2, 1])
    before, mark = logits(model(), batch), fingerprint(model())
    handle = tokenprune.apply(model(), name, keep=9)
    assert fingerprint(model()) != mark
    if handle.method.needed_hints:
        handle.set_hints(**example_hints(handle.method, 3))
    assert not torch.equal(logits(model(), batch), before)
    handle.remove()
    handle.remove()
    assert fingerprint(model()) == mark
    assert torch.equal(logits(model(), batch), before)


@pytest.mark.parametrize("keep", [36, 1000, 1.0])
@pytest.mark.parametrize("name", METHODS.names())
def test_keeping_everything_changes_no_bit(name, keep):
    batch = prompts([1, 2])
    before = logits(model(), batch)
    with tokenprune.applied(model(), name, keep=keep) as handle:
        assert torch.equal(logits(model(), batch), before)
        assert [len(images) for images in handle.kept] == [1, 2]
        assert torch.equal(handle.kept[1][0], torch.arange(36))


@pytest.mark.parametrize("where", ["tower", "projector", "decoder"])
def test_an_exception_in_the_middle_leaves_the_model_usable(where):
    batch = prompts([2, 0])
    before, mark = logits(model(), batch), fingerprint(model())
    part = {"tower": model().model.vision_tower.encoder.layers[1], "projector": model().model.multi_modal_projector,
            "decoder": model().model.language_model.layers[2]}[where]  # fmt: skip

    def explode(*_):
        raise RuntimeError("boom")

    handle = tokenprune.apply(model(), "vtc_cls", keep=9)
    good = logits(model(), batch)
    hook = part.register_forward_hook(explode)
    with pytest.raises(RuntimeError, match="boom"):
        logits(model(), batch)
    hook.remove()
    # a text-only prompt must not inherit anything from the failed call
    text = prompts([0])
    pruned_text = logits(model(), text)
    assert torch.equal(logits(model(), batch), good)
    handle.remove()
    assert fingerprint(model()) == mark
    assert torch.equal(logits(model(), batch), before) and torch.equal(logits(model(), text), pruned_text)
    with pytest.raises(RuntimeError, match="boom"), tokenprune.applied(model(), "vtc_cls", keep=9):
        raise RuntimeError("boom")
    assert fingerprint(model()) == mark


def test_a_failed_apply_leaves_nothing():
    mark = fingerprint(model())
    with pytest.raises(ValueError, match="start_layer"):
        tokenprune.apply(model(), "vtc_cls", keep=9, start_layer=99)
    assert fingerprint(model()) == mark
    tokenprune.apply(model(), "vtc_cls", keep=9).remove()


def test_applying_twice_is_an_error_unless_removed_first():
    handle = tokenprune.apply(model(), "uniform", keep=9)
    with pytest.raises(ValueError, match=r"uniform@9.*remove\(\)"):
        tokenprune.apply(model(), "random", keep=9)
    handle.remove()
    tokenprune.apply(model(), "random", keep=9).remove()


def test_kept_and_report_describe_the_last_prompt_only():
    with tokenprune.applied(model(), "uniform@9") as handle:
        assert handle.last is None
        with pytest.raises(RuntimeError, match="No prompt has run"):
            _ = handle.kept
        with torch.no_grad():
            model().generate(**prompts([1, 2, 0]), max_new_tokens=4, do_sample=False)
        assert [[len(image) for image in images] for images in handle.kept] == [[9], [9, 9], []]
        assert all(image.tolist() == sorted(image.tolist()) for images in handle.kept for image in images)
        report = handle.report()
        assert (report.samples, report.images, report.visual_tokens, report.kept_tokens) == (3, 3, 108, 27)
        assert report.prompt_tokens - report.kept_prompt_tokens == 81
        assert report.kv_bytes < report.kv_bytes_unpruned and report.flops.total < report.flops_unpruned.total
        assert "27 of 108" in str(report)
        first = handle.last
        logits(model(), prompts([0]))
        assert first.kept != handle.kept and len(first.layout.spans) == 3 and not handle.last.layout.spans
        assert handle.kept == [[]] and handle.report().visual_tokens == 0


def test_kv_bytes_of_the_report_are_the_bytes_that_the_cache_holds():
    with tokenprune.applied(model(), "vtc_cls@9") as handle, torch.no_grad():
        cache = cache_in(model()(**prompts([2])))
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert handle.report().kv_bytes == held


def test_toy_method_takes_one_class_and_passes_the_oracle():
    @tokenprune.register_method("toy")
    class Toy(tokenprune.Pruner):
        """Keeps the largest norms."""

        def score(self, view):
            return view.features.norm(dim=-1)

    try:
        assert "toy" in tokenprune.list_methods()
        for layout in ([1], "left"), ([1, 3, 0, 2], "left"):
            batch = prompts(*layout)
            compare(run_pruned(model(), "toy", 9, batch), batch, 1e-5)
    finally:
        METHODS.unregister("toy")
    assert "toy" not in tokenprune.list_methods()


def test_the_handle_shows_every_cut_of_a_composed_method():
    plan = [
        {"at": "vision:0", "prune": "random", "keep": 30},
        {"at": "input", "prune": "random", "keep": 20},
        {"at": "layer:2", "prune": "random", "keep": 6},
    ]
    batch = prompts([1, 2, 0])
    with tokenprune.applied(model(), plan) as handle, torch.no_grad():
        model()(**batch)
        assert [stage.site for stage in handle.stages] == ["vision:0", "input", "layer:2"]
        at = handle.kept_at
        assert list(at) == ["input", "layer:2"], "what left inside the tower leaves the rows at the input"
        for early, late in zip(at["input"], at["layer:2"]):
            for first, second in zip(early, late):
                assert len(first) == 20 and len(second) == 6 and set(second.tolist()) <= set(first.tolist())
        assert all(torch.equal(a, b) for rows in zip(at["layer:2"], handle.kept) for a, b in zip(*rows))
        assert handle.visual_by_layer == [[20, 20, 6, 6], [40, 40, 12, 12], [0, 0, 0, 0]]
        stays, visual = handle.stays, batch["input_ids"] == 5
        assert (stays & visual).sum(1).tolist() == [6, 12, 0] and bool(stays[~visual].all())
        text = str(handle.report())
    assert "visual tokens by layer  60 x 2, 18 x 2: 39.0 on average" in text
    assert "random@30 at vision:0 + random@20 at input + random@6 at layer:2" in text


def test_each_cut_is_filed_under_the_site_that_left_it():
    model = tiny_llava(vision_layers=8)
    handle, _ = forward(model, prompts([1]), "flowcut(text_stage=false)@8")
    assert {site: len(rows[0][0]) for site, rows in handle.kept_at.items()} == {handle.stages[-1].site: 8}


@pytest.mark.parametrize("method", ["vtc_cls@8", "fastv@8", "var(channels=[1],layers=[1,2])"])
def test_a_model_is_freed_though_its_method_was_never_removed(method):
    model = tiny_llava()
    there = weakref.ref(model)
    handle = tokenprune.apply(model, method)
    del handle, model
    gc.collect()
    assert there() is None


def test_features_computed_outside_a_forward_are_not_hoarded():
    def at_work():
        """Runs of the tower and of the model, and what they recorded, that something still holds."""
        gc.collect()
        return {id(item) for item in gc.get_objects() if type(item) in (ForwardCall, TowerPass, Recording)}

    model, batch = tiny_llava(), prompts([1])
    before = at_work()
    with tokenprune.applied(model, "vtc_cls@8"), torch.no_grad():
        features = [weakref.ref(model.get_image_features(batch["pixel_values"])) for _ in range(3)]
        assert at_work() <= before
        assert [reference() for reference in features] == [None, None, None]
        kept = model.get_image_features(batch["pixel_values"])
        assert len(at_work() - before) == 1 and kept is not None, "features know what was recorded of them"
