"""HoliTom on models, and its part inside the decoder."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _families import batch_of, family
from _tiny import prompts, tiny_llava
from _views import make_view
from masked_reference import compare, run_pruned

import tokenprune
from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths
from tokenprune.interfaces.signals import LAST_ATTENTION, Signal
from tokenprune.methods.holitom import HoliTom, InnerMerge


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)


def test_the_inner_part_stands_where_the_scripts_have_it() -> None:
    qwen = ModelDepths(vision=27, feature=25, decoder=28)
    assert [stage.site for stage in HoliTom().stages(Budget(0.15), qwen)] == ["input"]
    outer, inner = HoliTom(inner=0.5).stages(Budget(0.15), qwen)
    assert (outer.site, inner.site) == ("input", "layer:18")
    assert outer.budget.tokens(6272) == 941 and inner.budget.tokens(6272) == round(941 / 2)
    assert inner.pruner.positions == "keep" and inner.budget.tokens(3) == 1


def test_the_inner_part_is_a_plain_mean() -> None:
    for seed in range(60):
        draw = torch.Generator().manual_seed(seed)
        n = 3 + seed % 9
        k = 1 + seed % (n - 1)
        states = torch.randn(2, n, 8, generator=draw)
        attention = torch.randint(1, 6, (2, n), generator=draw) / 8
        had = torch.randint(1, 4, (2, n), generator=draw).float()
        view = make_view(
            InnerMerge(), (n, 1), k, images=2, features=states, site="layer:3", carry={"holitom_sizes": had},
            signals={Signal(LAST_ATTENTION, 2): attention},
        )  # fmt: skip
        found = InnerMerge().select(view)
        assert found.features is not None and found.sizes is not None and found.merged is not None
        for image in range(2):
            x = states[image].double().tolist()
            kept = sorted(sorted(range(n), key=lambda i: (-float(attention[image, i]), i))[:k])
            members = {i: [i] for i in kept}
            for i in set(range(n)) - set(kept):
                members[max(kept, key=lambda j: (cosine(x[i], x[j]), -j))].append(i)
            assert found.indices[image].tolist() == kept
            rows = torch.tensor([[sum(c) / len(c) for c in zip(*(x[j] for j in members[i]))] for i in kept])
            torch.testing.assert_close(found.features[image], rows, rtol=1e-5, atol=1e-6)
            sizes = [float(sum(had[image, j] for j in members[i])) for i in kept]
            assert (found.sizes[image] * had[image, kept]).tolist() == pytest.approx(sizes)
        assert found.merged.tolist() == [n - k] * 2


@pytest.mark.parametrize("key_bias", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_with_the_inner_part_removal_equals_masking(side: str, key_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[Any] = []
    select = InnerMerge.select
    monkeypatch.setattr(InnerMerge, "select", lambda self, view: recorded.append(select(self, view)) or recorded[-1])
    batch = prompts([1, 3, 0, 2], side)
    run = run_pruned(tiny_llava(), "holitom", 9, batch, inner=0.5, contextual=0.5, key_bias=key_bias)
    assert [site for site, _ in run["cuts"]] == ["input", "layer:3"]
    kept = run["cuts"][1][1]
    assert [len(tokens) for tokens in kept] == [4] * 6
    rows = torch.cat([torch.full_like(tokens, span.sample) for span, tokens in zip(run["layout"].spans, kept)])
    places = torch.cat([span.places[tokens] for span, tokens in zip(run["layout"].spans, kept)])
    merged = recorded[0].features.flatten(0, 1)
    hook = (
        run["adapter"]
        .layers[3]
        .register_forward_pre_hook(lambda module, args: (args[0].index_put((rows, places), merged), *args[1:]))
    )
    compare(run, batch, 1e-5)
    hook.remove()
    with pytest.raises(AssertionError):
        compare(run, batch, 1e-5)  # without what was merged
    if key_bias:
        outer, inner = run["sizes"]
        assert all(float(b.sum()) == pytest.approx(float(a.sum())) for a, b in zip(outer, inner))


@pytest.mark.parametrize("total", ["exact", "official"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "llava_onevision", "llava_next_video"])
def test_windows_of_videos_of_families(name: str, total: str) -> None:
    """With tau = -1 every place of a video is static."""
    batch = batch_of(name, "mixed_left")
    run = run_pruned(family(name), "holitom", 0.5, batch, tokens=4, tau=-1.0, total=total)
    compare(run, batch, 1e-5)
    videos = 0
    for span, kept in zip(run["layout"].spans, run["cuts"][0][1]):
        first, frames = span.visual.rasters[0], len(span.visual.rasters)
        if first.kind == "frame" and frames > 1:
            videos += 1
            half = Budget(0.5).tokens(frames * first.num_tokens)
            if total == "official":
                assert kept.tolist() == list(range(first.num_tokens)), "a window stands in its first frame"
            else:
                assert len(kept) == half
    assert videos == 2


def test_keeping_all_keeps_the_frames_unless_the_official_rule_is_asked_for() -> None:
    model, batch = family("qwen2_vl"), batch_of("qwen2_vl", "mixed_left")
    with torch.no_grad():
        plain = model(**batch).logits
        with tokenprune.applied(model, "holitom", keep=1.0, tau=-1.0):
            assert torch.equal(model(**batch).logits, plain)
        with tokenprune.applied(model, "holitom", keep=1.0, tau=-1.0, total="official") as handle:
            model(**batch)
    assert sorted(len(tokens) for row in handle.kept for tokens in row) == [16, 20, 35, 36]
