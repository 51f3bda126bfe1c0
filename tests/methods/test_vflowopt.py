"""VFlowOpt: selection, merges and budgets against loops written from its card, and the invariants of the card."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from _families import batch_of, family
from _tiny import prompts, tiny_llava
from _views import TOWER
from hypothesis import given
from hypothesis import strategies as st
from masked_reference import compare, run_pruned

import tokenprune
from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths
from tokenprune.interfaces.signals import GREY_ENTROPY, SINK_ATTENTION, SINK_ATTENTION_SUM
from tokenprune.interfaces.view import View
from tokenprune.interfaces.visual import Raster
from tokenprune.methods.vflowopt import SHIPPED, VFlowOpt, retention, shipped_ratios, stage_layers, third_ratio
from tokenprune.plan.checks import visual_lengths
from tokenprune.plan.parse import parse_method

ONEVISION = ModelDepths(vision=27, feature=25, decoder=28)


# The reference, in loops and float64


def reference_cells(rasters: list[Raster], side: float) -> list[tuple[int, int, int]]:
    return [
        (number, int(row // side), int(col // side))
        for number, raster in enumerate(rasters)
        for row in range(raster.grid[0])
        for col in range(raster.grid[1])
    ]


def reference_stage_1(score, features, rasters, places, budget, side, headroom):
    """Kept places and what stands there. `places` are the raster places of the tokens that are there."""
    count = len(score)
    lowest_first = sorted(range(count), key=lambda i: (score[i], -i))
    if headroom == "exact":
        while len(set(reference_cells(rasters, side))) > max(budget, len(rasters)):
            side *= 2
        if len(set(reference_cells(rasters, side))) > budget:
            return sorted(lowest_first[count - budget :]), {}
    cells = [reference_cells(rasters, side)[place] for place in places]
    if headroom == "official":
        pruned = lowest_first[: count - budget + int(count / side**2)]
    else:
        pruned, opened = [], set()
        while not pruned or count - len(pruned) + len(opened) != budget:
            pruned.append(lowest_first[len(pruned)])
            opened.add(cells[pruned[-1]])
    stays, merged = set(range(count)) - set(pruned), {}
    for cell in {cells[i] for i in pruned}:
        members = [i for i in pruned if cells[i] == cell]
        weights = [max(score[i], 0.0) for i in members]
        if sum(weights) == 0:
            weights = [1.0] * len(members)
        slot = max(members, key=lambda i: (score[i], -i))
        merged[slot] = [
            sum(w * features[i][d] for w, i in zip(weights, members)) / sum(weights) for d in range(len(features[0]))
        ]
        stays.add(slot)
    return sorted(stays), merged


def problem(draw: random.Random):
    rasters, start = [], 0
    shapes = [(draw.randint(1, 6), draw.randint(1, 7)) for _ in range(draw.choice([1, 1, 2, 3]))]
    for number, grid in enumerate(shapes):
        kind = "image" if len(shapes) == 1 else "thumbnail" if number == 0 else "mosaic"
        rasters.append(Raster(grid, start, kind))
        start += rasters[-1].num_tokens
    places = list(range(start))
    if draw.random() < 0.25 and start > 3:  # some left at an earlier site
        places = sorted(draw.sample(places, draw.randint(2, start)))
    count = len(places)
    ties = draw.choice([3, 8, 10**6])
    low = draw.choice([0, 0, -ties // 2, -ties])
    images = 6
    scores = [[draw.randint(low, ties) / 8 for _ in range(count)] for _ in range(images)]
    budget = draw.choice([1, 2, count - 1, draw.randint(1, max(count - 1, 1))])
    side = draw.choice([0.7, 1.0, draw.uniform(1, 4), draw.uniform(1, 9), 30.0])
    return rasters, places, start, scores, min(max(budget, 1), max(count - 1, 1)), side


def check_stage_1(seed: int) -> int:
    draw = random.Random(seed)
    rasters, places, total, scores, budget, side = problem(draw)
    count, images = len(places), len(scores)
    if count < 2:
        return 0
    features = torch.randint(-16, 17, (images, count, 3), generator=torch.Generator().manual_seed(seed)) / 8
    headroom = draw.choice(["exact", "exact", "official"])
    method = VFlowOpt(cell=side, headroom=headroom)
    signal = method.signals_at(TOWER, "input", 0)[0]
    view = View(
        features, tuple(rasters), budget, TOWER, {signal: torch.tensor(scores)},
        tokens=None if count == total else torch.tensor([places] * images),
    )  # fmt: skip
    selection = method.select(view).validate(images, count)
    for row in range(images):
        truth, merged = reference_stage_1(
            scores[row], features[row].tolist(), rasters, places, budget, side, headroom
        )  # fmt: skip
        length = selection.indices.shape[1] if selection.counts is None else selection.counts[row]
        assert selection.indices[row, :length].tolist() == truth, seed
        if headroom == "exact":
            assert length == budget
        if selection.features is not None:
            expected = torch.tensor([merged.get(i, features[row, i].tolist()) for i in truth], dtype=torch.float64)
            found = selection.features[row, :length]
            assert float((found - expected).abs().max()) < 2e-6  # of values up to 2
            same = [at for at, i in enumerate(truth) if i not in merged]
            assert torch.equal(found[same], features[row, truth][same])
    return images


def test_stage_1_equals_the_card_on_thousands_of_cases():
    assert sum(check_stage_1(seed) for seed in range(500)) > 2500


def reference_counts(num_tokens: int, ratios: tuple[float, float, float]) -> list[int]:
    """Ratios of the current count, rounded as in the code."""
    counts = [num_tokens]
    for ratio in ratios:
        counts.append(counts[-1] - round(counts[-1] * (1 - ratio)))
    return counts[1:]


@given(st.integers(20, 8000), st.floats(0.05, 1), st.floats(0.2, 1), st.floats(0.2, 1))
def test_counts_of_the_stages_are_those_of_the_card(num_tokens, first, second, third):
    method = VFlowOpt(first=first, second=second)
    stages = method.stages(Budget(first * second * third), ONEVISION)
    counts = [stage.budget.tokens(num_tokens) for stage in stages]
    truth = reference_counts(num_tokens, (first, second, third))
    assert counts[0] == max(truth[0], counts[2]) and abs(counts[1] - truth[1]) <= 1 and abs(counts[2] - truth[2]) <= 2
    assert counts[0] >= counts[1] >= counts[2]


@pytest.mark.parametrize(("row", "published"), list(zip(SHIPPED, (0.1000, 0.2507, 0.5007))))
def test_shipped_ratios_give_their_mean_retention(row, published):
    assert retention((row.first, row.second, row.third), (9, 9, 10)) == pytest.approx(published, abs=1e-4)
    assert shipped_ratios(row.last) == pytest.approx((row.first, row.second))
    stages = VFlowOpt().stages(Budget(row.last), ONEVISION)
    assert [stage.site for stage in stages] == ["input", "layer:9", "layer:18"]
    assert [stage.pruner.positions for stage in stages[1:]] == ["keep", "keep"]
    assert (stages[2].pruner.threshold, stages[0].pruner.cell) == pytest.approx((row.threshold, row.cell))
    for count in (729, 729 + 2916, 7290):
        mean = sum(visual_lengths(stages, count, 28)) / 28 / count
        assert mean == pytest.approx(published, rel=0.01)


def test_a_mean_over_the_layers_is_held_and_takes_the_shipped_knobs():
    for mean, row in zip((0.1, 0.25, 0.5), SHIPPED):
        stages = parse_method(f"vflowopt@avg{mean}").plan(ONEVISION, None)
        assert sum(visual_lengths(stages, 10**5, 28)) / 28 / 10**5 == pytest.approx(mean, rel=0.005)
        assert stages[0].pruner.threshold == pytest.approx(row.threshold, rel=0.02)
        assert stages[0].budget.tokens(10**5) / 10**5 == pytest.approx(row.first, rel=0.02)
    means = [sum(visual_lengths(VFlowOpt().stages(Budget(k), ONEVISION), 576, 28)) for k in range(1, 577)]
    assert means == sorted(means), "or an average could not be solved for"


@given(st.floats(0.02, 1), st.floats(0.05, 1), st.floats(0.2, 1), st.tuples(*[st.integers(1, 12)] * 3))
def test_the_third_ratio_solves_the_budget_equation(mean, first, second, layers):
    third = third_ratio(mean, first, second, layers)
    assert third <= 1
    if third < 1:
        assert retention((first, second, third), layers) == pytest.approx(mean, rel=1e-9, abs=1e-12)
    else:
        assert retention((first, second, 1), layers) <= mean * (1 + 1e-9)


def test_tuned_holds_the_budget_or_refuses():
    values = {"first": 0.3, "second": 0.8, "threshold": 3.0, "cell": 4.0, "alpha": 0.5}
    method = VFlowOpt.tuned(values, 0.25, ONEVISION)
    stages = parse_method(method).plan(ONEVISION, None)
    assert sum(visual_lengths(stages, 10**6, 28)) / 28 / 10**6 == pytest.approx(0.25, rel=1e-5)
    assert VFlowOpt.tuned({**values, "first": 1.0, "second": 1.0}, 0.25, ONEVISION) is None
    space = VFlowOpt.search_space(0.25, ONEVISION)
    box = {name: (part.low, part.high) for name, part in space.items()}
    assert box == {
        "first": (0.25, 0.375), "second": (0.2 / 0.375, 1.0), "threshold": (0, 50), "cell": (3, 24), "alpha": (-1, 1)
    }  # fmt: skip
    start = {name: part.start for name, part in space.items()}
    shipped = SHIPPED[1]
    assert start == pytest.approx({
        "first": shipped.first, "second": shipped.second, "threshold": shipped.threshold, "cell": shipped.cell,
        "alpha": 0,
    })  # fmt: skip


def test_later_stages_stand_at_thirds_or_where_a_model_can_be_cut():
    assert stage_layers(ONEVISION) == (9, 18)
    assert stage_layers(ModelDepths(24, 22, 32)) == (10, 20)
    assert stage_layers(ModelDepths(3, 2, 4, first_cut=2)) == (2, 3)
    assert stage_layers(ModelDepths(3, 2, 2)) == (1,)


# Invariants


def run(model, batch, *args, **options):
    with tokenprune.applied(model, *args, **options) as handle, torch.no_grad():
        output = model(**batch)
        return output.logits, handle.last, handle.report()


def test_keeping_all_changes_no_bit_and_stages_are_nested():
    model, batch = tiny_llava(layers=6), prompts([1, 2])
    with torch.no_grad():
        plain = model(**batch).logits
    for recycle in (True, False):
        assert torch.equal(run(model, batch, "vflowopt", 1.0, recycle=recycle)[0], plain)
    _, prompt, report = run(model, batch, "vflowopt", "avg0.5")
    sites = [cut.site for cut in prompt.cuts]
    assert sites == ["input", "layer:2", "layer:4"]
    for before, after in zip(prompt.cuts, prompt.cuts[1:]):
        assert all(set(b.tolist()) <= set(a.tolist()) for a, b in zip(before.tokens, after.tokens))
    assert report.equivalent_tokens / report.visual_tokens == pytest.approx(0.5, rel=0.02)


def test_the_selection_does_not_depend_on_the_question_or_the_attention_kernel():
    batch, other = prompts([2], seed=1), prompts([2], seed=7)
    other["pixel_values"] = batch["pixel_values"]
    kept = []
    for attention, inputs in (("sdpa", batch), ("sdpa", other), ("eager", batch)):
        prompt = run(tiny_llava(attention=attention), inputs, "vflowopt@9", threshold=1.2, alpha=0.5)[1]
        kept.append([[tokens.tolist() for tokens in cut.tokens] for cut in prompt.cuts])
    assert kept[0] == kept[1] == kept[2]


def merge_view(scores: torch.Tensor, features: torch.Tensor, budget: int) -> View:
    signal = VFlowOpt().signals_at(TOWER, "input", 0)[0]
    return View(
        features, (Raster((6, 6), 0, "thumbnail"), Raster((5, 8), 36, "mosaic")), budget, TOWER, {signal: scores}
    )


@pytest.mark.parametrize("seed", range(20))
def test_merged_tokens_lie_in_the_hull_of_their_cell_and_constants_stay(seed):
    generator = torch.Generator().manual_seed(seed)
    scores, features = torch.rand(2, 76, generator=generator), torch.randn(2, 76, 5, generator=generator)
    found = VFlowOpt(cell=3.2).select(merge_view(scores, features, 30))
    low, high = features.amin(1, keepdim=True), features.amax(1, keepdim=True)
    assert bool(((found.features >= low - 1e-5) & (found.features <= high + 1e-5)).all())
    own = features.gather(1, found.indices[..., None].expand(-1, -1, 5))
    changed = (found.features != own).any(2).sum(1)
    assert bool((changed <= 4 + 6).all()) and bool((changed > 0).all()), "at most one a cell"
    constant = VFlowOpt(cell=3.2).select(merge_view(scores, torch.full_like(features, 1.7), 30))
    torch.testing.assert_close(constant.features, torch.full_like(constant.features, 1.7))
    assert torch.equal(constant.indices, found.indices)


def test_frames_and_later_stages_recycle_nothing():
    signal = VFlowOpt().signals_at(TOWER, "input", 0)[0]
    scores, features = torch.rand(1, 36), torch.randn(1, 36, 4)
    video = View(features, (Raster((6, 6), 0, "frame"),), 9, TOWER, {signal: scores})
    later = View(features, (Raster((6, 6)),), 9, TOWER, {signal: scores}, site="layer:9")
    best = scores[0].topk(9).indices.sort().values
    for view in (video, later):
        found = VFlowOpt().select(view)
        assert found.features is None and torch.equal(found.indices[0], best)


def test_variants_differ_in_their_signals_only():
    official, paper = VFlowOpt(alpha=0.5), VFlowOpt(alpha=0.5, variant="paper")
    (attention, entropy), (total, natural) = (method.signals_at(TOWER, "input", 0) for method in (official, paper))
    assert (attention.name, total.name) == (SINK_ATTENTION, SINK_ATTENTION_SUM)
    assert attention.layer == TOWER.feature_layer and attention.settings == (34.76,)
    assert entropy.name == natural.name == GREY_ENTROPY
    assert entropy.settings == (2.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5) and natural.settings[0] == math.e
    assert len(VFlowOpt().signals_at(TOWER, "input", 0)) == 1, "alpha = 0: the pixels are not looked at"
    assert any("grey levels" in note for note in official.notes(TOWER))
    own = VFlowOpt(threshold=3.0, alpha=0.5, mean=[0.1] * 3, std=[0.2] * 3)
    assert not own.notes(TOWER) and "tune vflowopt" in dataclasses.replace(own, threshold=None).notes(TOWER)[0]
    assert not dataclasses.replace(own, threshold=None).notes(dataclasses.replace(TOWER, has_cls=False))


def test_pictures_in_crops_take_one_budget_and_their_own_cells():
    batch = batch_of("llava_onevision", "ragged_left")
    _, prompt, _ = run(family("llava_onevision"), batch, "vflowopt", 0.25, cell=2.5)
    for span in prompt.layout.spans:
        assert len(prompt.kept[span.sample][span.image]) == Budget(0.25).tokens(span.num_tokens)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"variant": "code"}, "variant must be one of official, paper"),
        ({"headroom": "none"}, "headroom must be one of exact, official"),
        ({"threshold": -1}, "threshold must be a number from 0 on, got -1"),
        ({"alpha": math.nan}, "alpha must be a finite weight"),
        ({"cell": 0}, "cell must be a side in tokens above 0"),
        ({"first": 1.2}, "first must be a kept fraction"),
        ({"mean": [0.5]}, "mean must be three numbers"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        VFlowOpt(**options)


def test_it_acts_behind_the_tower_only():
    with pytest.raises(ValueError, match="acts at 'input' and 'layer:K', not at 'vision'"):
        tokenprune.apply(tiny_llava(), {"at": "vision:1", "prune": "vflowopt", "keep": 9})


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_official_headroom_may_differ_by_picture_and_still_equals_masking(name):
    batch = batch_of(name, "ragged_left")
    done = run_pruned(family(name), "vflowopt", 0.3, batch, tokens=4, headroom="official", cell=2.5)
    counts = [len(tokens) for tokens in done["cuts"][0][1]]
    assert len(set(counts)) > 1 or name == "llava"
    compare(done, batch, 1e-5)
