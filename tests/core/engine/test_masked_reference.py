"""Promise 1: removal equals masking, for every registered method on every layout; cells come from the registries."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _families import _qwen_batch, family
from _tiny import prompts, tiny_llava
from masked_reference import compare, masked_of, relative_error, run_pruned, tower_runs

from tokenprune.registry import METHODS

LAYOUTS = {
    "one": ([1], "left"),
    "two_images": ([2], "left"),
    "ragged_left": ([1, 3, 0, 2], "left"),
    "ragged_right": ([1, 3, 0, 2], "right"),
    "no_padding": ([1], "right"),
}
TOLERANCE = 1e-5  # relative, fp32


def cells() -> list[tuple[str, str, str, str]]:
    """(method, attention, layout, positions): each layout with the published positions; the other policy and eager
    attention on the hardest layout."""
    found = []
    for name in METHODS.names():
        published = METHODS.get(name).published_positions
        other = "keep" if published == "compact" else "compact"
        found += [(name, "sdpa", layout, published) for layout in LAYOUTS]
        found += [(name, "sdpa", "ragged_left", other), (name, "eager", "ragged_left", published)]
    return found


MERGING: dict[str, dict[str, Any]] = {"fsr": {"rho": 0.3}, "holitom": {"contextual": 0.5}}
"""Options with which a method merges on pictures of so few tokens, where its defaults do not."""


def weighers() -> list[str]:
    """Methods whose kept tokens stand for several, as they say."""
    methods = {name: METHODS.get(name) for name in METHODS.names()}
    return [name for name, one in methods.items() if one.merges and one.says_sizes and one.site != "pixels"]


@functools.cache
def model(attention: str):
    """One model for all cells: `applied` must leave it as it was."""
    return tiny_llava(attention=attention)


@pytest.mark.parametrize(("name", "attention", "layout", "policy"), cells(), ids=lambda value: value)
def test_removal_equals_masking(name, attention, layout, policy):
    batch = prompts(*LAYOUTS[layout])
    run = run_pruned(model(attention), name, 9, batch, positions=policy)
    compare(run, batch, TOLERANCE)


@pytest.mark.parametrize(("attention", "layout"), [*[("sdpa", layout) for layout in LAYOUTS], ("eager", "ragged_left")])
@pytest.mark.parametrize("name", weighers())
def test_removal_equals_masking_where_merged_keys_are_biased(name, attention, layout):
    batch = prompts(*LAYOUTS[layout])
    options = MERGING.get(name, {})
    run = run_pruned(model(attention), name, 9, batch, key_bias=True, **options)
    compare(run, batch, TOLERANCE)
    truth = run["logits"]
    unbiased = run_pruned(model(attention), name, 9, batch, key_bias=False, **options)
    assert all(sizes is None for by_span in unbiased["sizes"] for sizes in by_span)
    compare(unbiased, batch, TOLERANCE)
    assert relative_error(unbiased["logits"], truth) > 1e-3, "the bias changes nothing"


@pytest.mark.parametrize("name", METHODS.names())
def test_the_masked_reference_can_fail(name):
    """One other token kept at the last cut, and the masked model must say no."""
    batch = prompts([2, 1])
    run = run_pruned(model("sdpa"), name, 9, batch)
    site, kept = run["cuts"][-1]
    before = run["cuts"][-2][1][0] if len(run["cuts"]) > 1 else torch.arange(36)
    other = next(i for i in before.tolist() if i not in kept[0])
    wrong = [torch.cat([kept[0][1:], torch.tensor([other])]).sort().values, *kept[1:]]
    run["cuts"][-1] = (site, wrong)
    truth = masked_of(run, batch).logits()
    assert relative_error(run["logits"], truth) > 1e-3


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("samples", [[[(2, 5, 4), (5, 7)], [(6, 6)]], [[(1, 6, 6), (6, 6)]]], ids=["sizes", "alike"])
def test_the_tower_need_not_run_in_the_order_of_the_prompt(name, samples):
    """A video before a picture: the model runs the picture first."""
    batch = _qwen_batch(name, samples, "left", 1)
    run = run_pruned(family(name), "flowcut", 5, batch, tokens=4)
    assert [kind for kind, work in run["tower"] if work.cuts] == ["video", "image"]
    compare(run, batch, TOLERANCE)


@pytest.mark.parametrize("order", [("image", "video", "image"), ("video", "image", "image")])
def test_runs_of_the_tower_are_told_by_what_the_model_asks_for(order):
    seen = []

    class Entry:
        def get_image_features(self):
            seen.append(running[0])

        def get_video_features(self):
            seen.append(running[0])
            self.get_image_features()  # some families run a video as pictures

    entry = Entry()
    adapter = SimpleNamespace(entry=entry, features={"image": "get_image_features", "video": "get_video_features"})
    works = [("image", "first"), ("video", "clip"), ("image", "second")]
    with tower_runs(adapter, works) as running:
        for kind in order:
            getattr(entry, adapter.features[kind])()
        assert running == []
    pictures = iter(["first", "second"])
    assert seen == [one for kind in order for one in ([next(pictures)] if kind == "image" else ["clip", "clip"])]
    assert not vars(entry), "it is as it was"
    with pytest.raises(AssertionError, match="did not come again"), tower_runs(adapter, works) as running:
        entry.get_image_features()
    with pytest.raises(AssertionError, match="did not have"), tower_runs(adapter, works[:1]) as running:
        entry.get_video_features()
