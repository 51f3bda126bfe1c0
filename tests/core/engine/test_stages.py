"""Stages that follow one another, with signals of the vision tower between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from _families import batch_of, family, layouts
from _forward import forward
from _tiny import prompts, tiny_llava
from masked_reference import relative_error
from torch import Tensor

import tokenprune
from tokenprune.api import adapter_for
from tokenprune.engine.batched_selection import exact_count
from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import grid_places
from tokenprune.interfaces.signals import CLS_ATTENTION, Signal
from tokenprune.interfaces.view import View
from tokenprune.methods.divprune import DivPrune
from tokenprune.methods.pool import Pool
from tokenprune.methods.uniform import Uniform
from tokenprune.methods.vtc_cls import VtcCls


def seen_scores(monkeypatch) -> list[Tensor]:
    seen: list[Tensor] = []
    stock = VtcCls.score

    def score(self, view):
        seen.append(stock(self, view))
        return seen[-1]

    monkeypatch.setattr(VtcCls, "score", score)
    return seen


@dataclass
class Watched(Pruner):
    """Ranks by [CLS] attention of one block, and writes it down."""

    name: ClassVar[str] = "watched"
    seen: ClassVar[list[Tensor]] = []

    def signals(self, tower):
        return (Signal(CLS_ATTENTION, 1),)

    def score(self, view: View) -> Tensor:
        self.seen.append(view.signal(CLS_ATTENTION, 1))
        return self.seen[-1]


def test_signals_of_a_smaller_picture_reach_the_stage_behind_it():
    model, batch = tiny_llava(), prompts([1])
    Watched.seen.clear()
    plan = ["downsample@16", {"method": Watched(), "keep": 4}]
    handle, _ = forward(model, batch, plan)
    # the same picture, shrunk by hand
    small = handle.adapter.vision.resize("image", {"pixel_values": batch["pixel_values"]}, [], [(4, 4)])
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = tower(**small, output_attentions=True).attentions[1][:, :, 0, 1:].mean(1)
    (asked,) = Watched.seen
    assert asked.shape == (1, 16)
    torch.testing.assert_close(asked / asked.sum(), wanted / wanted.sum(), rtol=1e-4, atol=0)
    cells = torch.tensor(grid_places((6, 6), (4, 4)))
    assert handle.kept[0][0].tolist() == sorted(cells[wanted[0].argsort(descending=True)[:4]].tolist())


def test_smaller_pictures_of_several_sizes_are_ranked_too(monkeypatch):
    seen = seen_scores(monkeypatch)
    handle, _ = forward(family("qwen2_vl"), batch_of("qwen2_vl", "ragged_left"), ["downsample@0.4", "vtc_cls@2"])
    assert seen and all(float(scores.amax(1).min()) > 0 for scores in seen)
    assert {len(kept) for row in handle.kept for kept in row} == {2}


def test_signals_from_between_two_cuts_of_the_tower_reach_later_stages():
    """VTC-CLS behind FlowCut: its sum has every block, each for the patches that were there."""
    model, batch, seen = tiny_llava(vision_layers=12), prompts([1]), []

    @dataclass
    class Watched(VtcCls):
        name: ClassVar[str] = "vtc_cls"

        def select(self, view):
            seen.append((view.tokens, view.signals))
            return super().select(view)

    plan = ["flowcut@12", {"at": "input", "prune": Watched(start_layer=4), "keep": 6}]
    with tokenprune.applied(model, plan) as handle, torch.no_grad():
        model(**batch)
        cuts = handle.last.tower[0].cuts
    ((tokens, signals),) = seen
    assert sorted(signal.layer for signal in signals) == list(range(4, 11)) and len(cuts) > 2
    # the tower run again, cut alike: block by block, what [CLS] pays to the patches of that block
    from transformers.models.clip.modeling_clip import eager_attention_forward

    tower = model.model.vision_tower
    states = tower.pre_layrnorm(tower.embeddings(batch["pixel_values"]))
    alive = torch.arange(36)
    for block, layer in enumerate(tower.encoder.layers[:11]):
        attention = layer.self_attn
        normed = layer.layer_norm1(states)
        query, key, value = (
            getattr(attention, name)(normed).unflatten(-1, (4, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed, weights = eager_attention_forward(attention, query, key, value, None, attention.scale)
        states = states + attention.out_proj(mixed.flatten(2))
        states = states + layer.mlp(layer.layer_norm2(states))
        (found,) = [values for signal, values in signals.items() if signal.layer == block] or [None]
        if found is not None:
            row = torch.zeros(36).index_copy(0, alive, weights[0, :, 0, 1:].mean(0))
            assert relative_error(found[0], row[tokens[0]]) < 1e-5 and bool((found > 0).all())
        for _, (left,) in [cut for cut in cuts if cut[0] == block]:
            same = torch.isin(alive, left).nonzero()[:, 0]
            states, alive = torch.cat([states[:, :1], states[:, 1:][:, same]], dim=1), left


@pytest.mark.parametrize(
    ("kind", "scope"), [(Pool, "raster"), (Uniform, "raster"), (DivPrune, "raster"), (DivPrune, "visual")]
)
@pytest.mark.parametrize("keep", [3, 10, 0.5, 1.0])
def test_the_number_that_is_said_before_a_run_is_the_number_that_stays(kind, scope, keep):
    """Of pictures in tiles, each of which `scope="raster"` gives a share of its own."""
    model, pruner, budget = family("llava_next"), kind(scope=scope), Budget(keep)
    with tokenprune.applied(model, pruner, keep=keep) as handle, torch.no_grad():
        model(**batch_of("llava_next", layouts("llava_next")[-1]))
    (stage,) = pruner.stages(budget, adapter_for(model).depths)
    visuals = [span.visual for span in handle.last.layout.spans]
    assert any(len(visual.rasters) > 1 for visual in visuals)
    said = [exact_count(stage, visual.rasters, budget.tokens(visual.num_tokens)) for visual in visuals]
    assert [len(kept) for row in handle.kept for kept in row] == said
