"""FlowCut against loops in fp64: the schedule in the tower, the second cut in the decoder, and its two forms."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from _families import _anyres_batch, batch_of, family
from _tiny import prompts, tiny_llava
from _views import TOWER
from masked_reference import compare, relative_error, run_pruned

import tokenprune
from tokenprune.api import adapter_for
from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths
from tokenprune.interfaces.signals import (
    CLS_PATCH_ATTENTION,
    CLS_PATCH_SIMILARITY,
    DECODER_VALUE_NORM,
    LAST_VALUE_SIMILARITY,
    LAST_VISUAL_ATTENTION,
    MEAN_VALUE_SIMILARITY,
    Signal,
    TowerInfo,
)
from tokenprune.interfaces.view import View
from tokenprune.interfaces.visual import Raster, Visual
from tokenprune.methods.flowcut import FlowCut, OverBudget, TextCut

VARIANTS = ["official", "paper"]
MANY = ModelDepths(vision=24, feature=22, decoder=32, one_size=False)


def to_one(values: list[float]) -> list[float]:
    return [value / sum(values) for value in values]


def ranked(scores: list[float], count: int) -> tuple[list[int], float]:
    """The highest `count` places in order, and the gap at the boundary relative to the largest score."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    gap = scores[order[count - 1]] - scores[order[count]] if 0 < count < len(order) else 1.0
    return sorted(order[:count]), gap / max(scores)


class Reference:
    """One image, block after block, as the card tells it; signals are drawn once for each patch and block."""

    def __init__(self, count: int, target: int, blocks: int, draw: random.Random) -> None:
        self.alive, self.target, self.last = list(range(count)), target, blocks - 1
        self.running: list[float] | None = None
        self.count = count
        # half of the patches are copies of another, so that ties are common
        kinds = [draw.randrange(count) if draw.random() < 0.5 else i for i in range(count)]
        self.drawn = [
            {name: [rows[kind] for kind in kinds] for name, rows in zip("amd", ([draw.uniform(0.001, 1) ** 3 for _ in
             range(count)] for _ in range(3)))} for _ in range(blocks)
        ]  # fmt: skip

    def signal(self, block: int, name: str) -> list[float]:
        return [self.drawn[block][name][i] for i in self.alive]

    def block(self, block: int, similar: bool) -> tuple[list[int] | None, float]:
        """Which of the patches that are there stay after a block; None where it does not cut. And the smallest gap."""
        if len(self.alive) <= self.target:
            return None, 1.0
        a = to_one(self.signal(block, "a"))
        m = to_one(self.signal(block, "m")) if similar else [0.0] * len(a)
        score = [(x + y) * d for x, y, d in zip(a, m, self.signal(block, "d"))]
        self.running = score if self.running is None else [0.5 * c + 0.5 * s for c, s in zip(self.running, score)]
        left = self.last - block
        if left % 2:
            return None, 1.0
        present = len(self.alive)
        near = 1.0
        if left:
            ratio = -sum(p * math.log(p) for p in a) / math.log(present) if present > 1 else 0.0
            wanted = (present - self.target) / math.sqrt(left) * (1 - ratio**2)
            near = abs(wanted % 1 - 0.5)  # rounding may go either way there
            gone = min(max(round(wanted), 0), present - self.target)
        else:
            gone = present - self.target
        kept, gap = ranked(self.running, present - gone)
        self.running = [self.running[i] for i in kept]
        return kept, min(near, gap) if gap else near


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tower_is_cut_as_in_loops(variant, has_cls):
    """Pictures of one shape at a time, whose counts drift apart; then each goes on alone, as the engine has it."""
    draw, compared, cuts = random.Random(f"{variant}{has_cls}"), 0, 0
    for _ in range(120):
        count, blocks = draw.randint(1, 40), draw.randint(1, 9)
        target = draw.choice([1, count, draw.randint(1, count)])
        tower = TowerInfo(num_layers=blocks + 2, feature_layer=blocks, has_cls=has_cls, num_heads=2, hidden_size=32)
        method = FlowCut(variant=variant)
        stages = method.stages(Budget(target), ModelDepths(blocks + 2, blocks, 32))
        reference, carry = Reference(count, target, blocks, draw), {}
        similar = has_cls or variant == "paper"
        done = -1
        for stage in stages:
            present, values = len(reference.alive), {}
            wanted = stage.signals(tower)
            assert {signal.layer for signal in wanted} == set(range(done + 1, stage.depth + 1))
            for signal in wanted:
                kind = "d" if signal.name == "value_norm" else "m" if "similarity" in signal.name else "a"
                values[signal] = torch.tensor([reference.signal(signal.layer, kind)])
            if not similar:
                assert not any("similarity" in signal.name for signal in wanted)
            kept, gap = None, 1.0
            for block in range(done + 1, stage.depth + 1):
                kept, gap = reference.block(block, similar)
            done = stage.depth
            view = View(torch.zeros(1, present, 4), (Raster((1, count)),), target, tower, values, site=stage.site,
                        tokens=None if present == count else torch.tensor([reference.alive]), carry=carry)  # fmt: skip
            selection = method.select(view).validate(1, present)
            number = present if selection.counts is None else selection.counts[0]
            found = selection.indices[0, :number].tolist()
            kept = list(range(present)) if kept is None else kept
            if gap > 1e-5:
                compared, cuts = compared + 1, cuts + (len(kept) < present)
                assert found == kept
            else:
                break  # a coin's throw: the two may go on with different patches
            carry = {name: rows[:, found] for name, rows in (selection.carry or {}).items()}
            reference.alive = [reference.alive[i] for i in kept]
        else:
            assert len(reference.alive) == target
    assert compared > 250 and cuts > 120


def test_the_second_cut_equals_loops_on_random_signals():
    draw, compared, ties = random.Random(5), 0, 0
    for _ in range(1500):
        count = draw.randint(2, 50)
        keep = draw.choice([1, count - 1, draw.randint(1, count - 1)])
        kinds = [draw.randrange(count) if draw.random() < 0.5 else i for i in range(count)]
        drawn = [[draw.uniform(0.001, 1) for _ in range(count)] for _ in range(3)]
        a, m, d = ([row[kind] for kind in kinds] for row in drawn)
        names = (LAST_VISUAL_ATTENTION, LAST_VALUE_SIMILARITY, DECODER_VALUE_NORM)
        signals = {Signal(name, 1): torch.tensor([rows]) for name, rows in zip(names, (a, m, d))}
        view = View(torch.zeros(1, count, 4), (Raster((1, count)),), keep, TOWER, signals, site="layer:2")
        scores = [(x + y) * z for x, y, z in zip(to_one(a), to_one(m), d)]
        expected, gap = ranked(scores, keep)
        if gap > 1e-5 or gap == 0:
            compared, ties = compared + 1, ties + (gap == 0)
            assert TextCut().select(view).indices[0].tolist() == expected
    assert compared > 1400 and ties > 20


# --- which models get a second cut ------------------------------------------------------------------------------------


def test_models_of_one_small_size_have_no_second_cut():
    stages = FlowCut().stages(Budget(64), dataclasses.replace(MANY, one_size=True))
    assert {stage.place for stage in stages} == {"vision"} and stages[0].budget.tokens(576) == 64
    assert adapter_for(tiny_llava()).depths.one_size
    for name in ("llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        assert not adapter_for(family(name)).depths.one_size


def test_models_of_many_tokens_keep_more_in_the_tower_and_t_behind_layer_1():
    stages = FlowCut().stages(Budget(64), MANY)
    assert stages[-1].site == "layer:2" and stages[-1].budget.tokens(2880) == 64
    assert [stage.budget.tokens(2880) for stage in stages[:-1]] == [128] * 11
    alone = FlowCut(text_stage=False).stages(Budget(64), MANY)
    assert [stage.budget.tokens(2880) for stage in alone] == [64] * 11
    late = FlowCut().stages(Budget(64), dataclasses.replace(MANY, first_cut=3))
    assert late[-1].site == "layer:3" and late[-1].signals(TOWER)[0].layer == 2
    with pytest.raises(ValueError, match="variant must be one of"):
        FlowCut(variant="code")


@pytest.mark.parametrize(
    ("crops", "kind", "by_crop", "expected"),
    [
        (1, "image", True, [14]),  # Qwen2-VL: 2 T
        (3, "image", True, [3, 3, 3]),  # LLaVA-NeXT: int(T / 2) of each crop
        (5, "image", True, [3] * 5),
        (4, "image", False, [4, 4, 3, 3]),  # the paper: 2 T
        (4, "video", True, [4, 4, 3, 3]),
    ],
)
def test_what_each_picture_keeps_in_the_tower(crops, kind, by_crop, expected):
    visual = Visual(tuple(Raster((6, 6), 36 * i) for i in range(crops)), kind)
    assert OverBudget(7, by_crop).pictures(visual) == expected
    # 40 tokens in crops of 36 patches, the rest being padding
    padded = Visual((Raster((5, 8)),), kind, crops=((6, 6),) * crops)
    assert OverBudget(40, by_crop).pictures(padded) == Budget(1.0).pictures(padded) == [36] * crops


@pytest.mark.parametrize("keep", [9, 1, 200])
def test_llava_next_keeps_half_the_target_of_each_crop_and_then_the_target(keep):
    batch = batch_of("llava_next", "ragged_left")
    run = run_pruned(family("llava_next"), "flowcut", keep, batch, tokens=4)
    compare(run, batch, 1e-5)
    ((_, work),) = run["tower"]
    cuts = dict(run["cuts"])
    last = work.cuts[-1][1] if work.cuts else [None] * len(work.grids)
    half = max(keep // 2, 1)
    assert all((16 if cells is None else len(cells)) == min(half, 16) for cells in last)
    first = next(iter(cuts.values())) if cuts else [None] * len(run["layout"].spans)
    start = 0
    for index, span in enumerate(run["layout"].spans):
        crops = len(span.visual.tower_grids)
        # survivors in the order of the stitched picture, those in its padding gone
        there = torch.zeros(16 * crops, dtype=torch.bool)
        for crop in range(crops):
            cells = last[start + crop]
            there[16 * crop + (torch.arange(16) if cells is None else cells)] = True
        start += crops
        expected = there[span.visual.sources].nonzero()[:, 0]
        found = torch.arange(span.num_tokens) if first[index] is None else first[index]
        assert torch.equal(found, expected)
        kept = run["kept"][span.sample][span.image]
        assert len(kept) == min(keep, len(expected)) and set(kept.tolist()) <= set(expected.tolist())
    by_layer = run["report"].visual_by_layer
    assert by_layer[0] == by_layer[1] and by_layer[2] == by_layer[3] <= by_layer[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_tokens_of_a_picture_with_much_padding_are_kept_by_a_budget_of_all(variant):
    """Strips, half of whose mosaic is padding: shares of their tokens would be less than the crops' patches."""
    model, batch = family("llava_next"), _anyres_batch("llava_next", [[(8, 60)], [(60, 8), (30, 60)]], "left", 1)
    with torch.no_grad():
        plain = model(**batch).logits
        for plan in (FlowCut(variant=variant), FlowCut(text_stage=False)):
            with tokenprune.applied(model, plan, keep=1.0) as handle:
                assert torch.equal(model(**batch).logits, plain)
                strip = handle.last.layout.spans[0]
        assert strip.num_tokens < 16 * len(strip.visual.tower_grids)
        with tokenprune.applied(model, {"at": "vision:0", "prune": "random", "keep": 1.0}):
            assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_qwen_keeps_twice_the_target_and_then_the_target(name):
    run = run_pruned(family(name), "flowcut", 9, batch_of(name, "mixed_left"), tokens=4)
    compare(run, batch_of(name, "mixed_left"), 1e-5)
    spans = len(run["layout"].spans)
    assert run["report"].visual_by_layer == (18 * spans, 18 * spans, 9 * spans, 9 * spans)


@pytest.mark.parametrize("options", [{"variant": "paper"}, {"text_stage": False}])
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen3_vl"])
def test_the_other_forms_equal_masking(name, options):
    batch = batch_of(name, "ragged_left")
    run = run_pruned(family(name), {"method": "flowcut", "keep": 8, **options}, None, batch, tokens=4)
    compare(run, batch, 1e-5)
    by_layer = run["report"].visual_by_layer
    assert (by_layer[0] > by_layer[-1]) == (name != "llava" and "variant" in options)


def test_the_tower_does_not_know_the_question_and_the_second_cut_does():
    batch, model = batch_of("llava_next", "one_left"), family("llava_next")
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, -4:] = torch.tensor([9, 33, 12, 60])
    cuts = []
    with tokenprune.applied(model, "flowcut@9") as handle, torch.no_grad():
        for inputs in (batch, other):
            model(**inputs)
            cuts.append([cut.tokens[0] for cut in handle.last.cuts])
    assert torch.equal(cuts[0][0], cuts[1][0]) and not torch.equal(cuts[0][1], cuts[1][1])


# --- the signals ------------------------------------------------------------------------------------------------------


def keep_first(seen: dict[str, torch.Tensor], name: str) -> Any:
    """A hook that keeps the output of the first call and changes nothing."""

    def hook(module: Any, args: Any, output: torch.Tensor) -> None:
        seen.setdefault(name, output)

    return hook


@pytest.mark.parametrize("side", ["left", "right"])
def test_signals_of_the_second_cut_equal_the_definition(side):
    """Layer 1's query, keys and values, by hooks of the test's own and rotated by hand; grouped heads repeated."""
    model, batch, views, seen = tiny_llava(), prompts([1, 2], side), [], {}

    @dataclasses.dataclass
    class Watched(TextCut):
        def select(self, view):
            views.append(view)
            return super().select(view)

    attention = model.model.language_model.layers[1].self_attn
    hooks = [getattr(attention, f"{name}_proj").register_forward_hook(keep_first(seen, name)) for name in "qkv"]
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with tokenprune.applied(model, {"at": "layer:2", "prune": Watched(), "keep": 5}) as handle, torch.no_grad():
        model(**batch, position_ids=positions)
        spans = handle.last.layout.spans
    for hook in hooks:
        hook.remove()
    half = torch.arange(0, 12, 2).double() / 12
    for index, span in enumerate(spans):
        angles = positions[span.sample][:, None] * 10000.0**-half
        cos, sin = angles.cos(), angles.sin()

        def turned(part: torch.Tensor, cos: Any = cos, sin: Any = sin) -> torch.Tensor:
            a, b = part.chunk(2, dim=1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=1)

        last = int(batch["attention_mask"][span.sample].nonzero()[-1])
        a, m, total = 0.0, 0.0, 0.0
        for head in range(4):
            query, key, value = (
                seen[name][span.sample].double()[:, (h := head if name == "q" else head // 2) * 12 : (h + 1) * 12]
                for name in "qkv"
            )
            a = a + (turned(key)[span.places] @ turned(query)[last] / math.sqrt(12)).softmax(0) / 4
            m = m + (value[span.places] @ value[last] / math.sqrt(12)).softmax(0) / 4
            total = total + value[span.places] / 4
        truth = {LAST_VISUAL_ATTENTION: a, LAST_VALUE_SIMILARITY: m, DECODER_VALUE_NORM: total.abs().sum(1)}
        for name, expected in truth.items():
            found = views[0].signals[Signal(name, 1)][index]
            assert relative_error(found, expected) < 1e-5, name


def test_signals_of_the_papers_form_equal_the_definition():
    model, batch = tiny_llava(), prompts([2])
    tower, seen = model.model.vision_tower, {}
    block = tower.encoder.layers[0].self_attn
    hooks = [getattr(block, f"{name}_proj").register_forward_hook(keep_first(seen, name)) for name in "qkv"]
    with tokenprune.applied(model, FlowCut(variant="paper"), keep=9), torch.no_grad():
        features = model.model.get_image_features(batch["pixel_values"], return_dict=True)
        recording = features.pooler_output[0]._tokenprune_source[0]
    with tokenprune.applied(model, {"at": "input", "prune": _Mean(), "keep": 9}), torch.no_grad():
        features = model.model.get_image_features(batch["pixel_values"], return_dict=True)
        mean = features.pooler_output[0]._tokenprune_source[0]
    for hook in hooks:
        hook.remove()
    for picture in range(2):
        expected: dict[str, Any] = dict.fromkeys((CLS_PATCH_ATTENTION, CLS_PATCH_SIMILARITY, MEAN_VALUE_SIMILARITY), 0)
        for head in range(4):
            q, k, v = (seen[name][picture, :, head * 8 : head * 8 + 8].double() for name in "qkv")
            expected[CLS_PATCH_ATTENTION] += (k[1:] @ q[0] / math.sqrt(8)).softmax(0) / 4
            expected[CLS_PATCH_SIMILARITY] += (v[1:] @ v[0] / math.sqrt(8)).softmax(0) / 4
            expected[MEAN_VALUE_SIMILARITY] += (v[1:] @ v[1:].mean(0) / math.sqrt(8)).softmax(0) / 4
        for name, truth in expected.items():
            source = mean if name == MEAN_VALUE_SIMILARITY else recording
            assert relative_error(source.signals[Signal(name, 0)][picture], truth) < 1e-5, name


@dataclasses.dataclass
class _Mean(TextCut):
    """Asks for one signal of the tower."""

    def signals_at(self, tower, place, depth):
        return (Signal(MEAN_VALUE_SIMILARITY, 0),)
