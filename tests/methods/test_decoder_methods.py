"""FastV, PyramidDrop and ToDRE's second stage: the scores equal eager attention, the schedules those of the cards."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from _families import BUILDERS, batch_of, family
from _tiny import prompts, tiny_llava
from masked_reference import compare, relative_error, run_pruned

import tokenprune
from tokenprune.interfaces.pruner import ModelDepths
from tokenprune.interfaces.view import View
from tokenprune.methods.fastv import FastV
from tokenprune.methods.pyramiddrop import PyramidDrop, StepBudget
from tokenprune.methods.todre import DropAllStage, ToDRE

LLAVA = ModelDepths(vision=24, feature=22, decoder=32)


@functools.cache
def eager() -> Any:
    return tiny_llava(attention="eager")


def attentions(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Head-mean attention `[B, S, S]` of each layer of the unpruned model."""
    with torch.no_grad():
        found = eager()(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0),
                        output_attentions=True).attentions  # fmt: skip
    return [layer.float().mean(1) for layer in found]


@dataclass
class _Seen:
    """Keeps the views that a method was shown."""

    views: list[View] = field(default_factory=list)


def watched(cls: Any, seen: _Seen) -> Any:
    """`cls` with a `select` that keeps what it sees."""

    class Watched(cls):
        def select(self, view):
            seen.views.append(view)
            return super().select(view)

    return dataclasses.dataclass(Watched)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("cls", "read"), [(FastV, 1), (PyramidDrop, 1)])
def test_scores_equal_the_last_row_of_eager_attention(cls, read, side, attention):
    """FastV at K = 2 reads layer 1 as it ran; PyramidDrop's first cut, K = 1 of 4, tries layer 1 on its input."""
    batch, seen = prompts([1, 2], side), _Seen()
    model = tiny_llava(attention=attention)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with tokenprune.applied(model, watched(cls, seen)(), keep=9) as handle, torch.no_grad():
        model(**batch, position_ids=positions)
        spans = handle.last.layout.spans
    truth = attentions(batch)[read]
    expected = []
    for span in spans:
        last = int(batch["attention_mask"][span.sample].nonzero()[-1])
        expected.append(truth[span.sample, last, span.places])
    first = seen.views[0]
    (signal,) = first.signals
    assert signal.layer == read
    assert relative_error(first.signals[signal], torch.stack(expected)) < 1e-5


def test_the_kept_tokens_are_those_with_the_highest_last_row():
    batch = prompts([1])
    with tokenprune.applied(tiny_llava(), "fastv", keep=7) as handle, torch.no_grad():
        handle.model(**batch)
        kept, span = handle.kept[0][0], handle.last.layout.spans[0]
    row = attentions(batch)[1][0, -1, span.places]
    assert kept.tolist() == sorted(row.topk(7).indices.tolist())


def test_pyramiddrop_falls_geometrically_and_never_rounds_up():
    stages = PyramidDrop().stages(tokenprune.plan.parse.Budget(72), LLAVA)
    assert [stage.site for stage in stages] == ["layer:8", "layer:16", "layer:24"]
    assert [stage.budget.tokens(576) for stage in stages] == [288, 144, 72]
    assert [stage.budget.tokens(2880) for stage in PyramidDrop().stages(tokenprune.plan.parse.Budget(360), LLAVA)] == [
        1440, 720, 360,
    ]  # fmt: skip
    for keep in (1, 5, 64, 576):
        counts = [StepBudget(keep, step, 3).tokens(576) for step in (1, 2, 3)]
        assert counts[-1] == keep and counts == sorted(counts, reverse=True) and counts[0] <= 576
    for num_tokens in range(1, 3000):
        counts = [StepBudget(0.125, step, 3).tokens(num_tokens) for step in (1, 2, 3)]
        assert counts == [max(1, int(num_tokens / share)) for share in (2, 4, 8)], "what the official code takes"
    assert [StepBudget(0.125, step, 3).tokens(2340) for step in (1, 2, 3)] == [1170, 585, 292]
    for keep in (0.001, 0.3, 0.55, 1.0):
        counts = [StepBudget(keep, step, 3).tokens(577) for step in (1, 2, 3)]
        assert counts[-1] == max(1, int(577 * keep)) and counts == sorted(counts, reverse=True) and counts[0] <= 577
    with pytest.raises(ValueError, match="layers must increase"):
        PyramidDrop(layers=[9, 3])


@pytest.mark.parametrize("cls", [FastV, PyramidDrop])
def test_methods_of_the_decoder_act_nowhere_else(cls):
    with pytest.raises(ValueError, match="acts at 'layer:K', not at 'input'"):
        tokenprune.apply(tiny_llava(), {"at": "input", "prune": cls.name, "keep": 9})


def test_the_position_policies_are_the_published_ones():
    with tokenprune.applied(tiny_llava(), "fastv@9") as handle:
        assert handle.method.positions == "keep"
    with tokenprune.applied(tiny_llava(), "pyramiddrop@9") as handle:
        assert handle.method.positions == "compact"
    with tokenprune.applied(family("qwen2_vl"), "pyramiddrop@9") as handle:
        assert handle.method.positions == "keep", "M-RoPE ids are kept"
    with pytest.raises(ValueError, match="3-D ids"):
        tokenprune.apply(family("qwen2_vl"), "random@9", positions="compact")


# --- ToDRE, stage 2 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_shares_equal_those_of_the_eager_attention_matrix(side):
    """With every visual token there, the shares of layer 2 (K = floor(7 / 8 * 4) = 3) are sums over its matrix."""
    batch, seen = prompts([1, 4], side), _Seen()  # more tokens than are read at a time
    model = tiny_llava()
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    plan = [{"at": "layer:3", "prune": watched(DropAllStage, seen)(tau=0.0), "keep": 1.0}]
    with tokenprune.applied(model, plan) as handle, torch.no_grad():
        model(**batch, position_ids=positions)
        layout = handle.last.layout
    matrix = attentions(batch)[2]
    for row in range(2):
        visual = torch.zeros(matrix.shape[-1], dtype=torch.bool)
        for span in layout.spans:
            if span.sample == row:
                visual[span.places] = True
        first = int(visual.nonzero()[0])
        real = batch["attention_mask"][row].bool()
        text = real & ~visual & (torch.arange(len(real)) > first)
        to_visual = matrix[row][text][:, visual].sum() / text.sum()
        to_text = matrix[row][visual][:, text].sum() / visual.sum()
        found = {name.name: values for name, values in seen.views[0].signals.items()}
        index = [span.sample for span in layout.spans].index(row)
        assert relative_error(found["text_to_visual"][index], to_visual) < 1e-5
        if row == 0:
            assert float(found["visual_to_text"][index]) == 0 == float(to_text), "causal: all text follows"
        else:
            assert relative_error(found["visual_to_text"][index], to_text) < 1e-5


@pytest.mark.parametrize("name", list(BUILDERS))
def test_all_visual_tokens_leave_where_stage_two_fires(name):
    batch = batch_of(name, "ragged_left")
    run = run_pruned(family(name), {"method": "todre", "keep": 9, "tau": 2.0}, None, batch, tokens=6)
    compare(run, batch, 1e-5)
    assert run["report"].visual_by_layer[-1] == 0 < run["report"].visual_by_layer[0]


def test_the_decision_is_each_prompts_own():
    """A threshold between the shares of two prompts: one loses its visual tokens, the other keeps them."""
    batch, seen = prompts([1, 1]), _Seen()
    model = tiny_llava()
    with tokenprune.applied(model, [{"at": "layer:3", "prune": watched(DropAllStage, seen)(tau=0.0), "keep": 1.0}]):
        model(**batch)
    (signal,) = [s for s in seen.views[0].signals if s.name == "text_to_visual"]
    shares = seen.views[0].signals[signal]
    tau = float(shares.mean())
    plan = [{"at": "layer:3", "prune": DropAllStage(tau=tau), "keep": 1.0}]
    run = run_pruned(model, plan, None, batch, tokens=6)
    compare(run, batch, 1e-5)
    assert sorted(len(images[0]) for images in run["kept"]) == [0, 36]
    assert len(run["kept"][int(shares.argmin())][0]) == 0


def test_a_threshold_of_zero_never_fires_and_changes_no_bit():
    batch, model = prompts([1, 3, 0, 2]), tiny_llava()
    with torch.no_grad():
        with tokenprune.applied(model, ToDRE(tau=0.0), keep=9):
            both = model(**batch).logits
        with tokenprune.applied(model, ToDRE(fade=False), keep=9):
            assert torch.equal(model(**batch).logits, both)


def test_the_flops_of_the_shares_are_those_that_torch_counts():
    from tokenprune.evals.profiling.flops import flop_counter
    from tokenprune.state.device_timer import DeviceTimer

    model, batch, spent = tiny_llava(), prompts([4]), [0, 0]
    plan = [{"at": "layer:3", "prune": DropAllStage(tau=0.0), "keep": 1.0}]
    with tokenprune.applied(model, plan) as handle, torch.no_grad(), flop_counter() as counter:

        def listen(begins: bool) -> None:
            now = counter.get_total_flops()
            spent[0], spent[1] = (spent[0], now) if begins else (spent[0] + now - spent[1], now)

        DeviceTimer.listener = listen
        try:
            model(**batch)
        finally:
            DeviceTimer.listener = None
        assert handle.report().flops.selection == pytest.approx(spent[0], rel=0.01)


def test_stage_two_stands_at_seven_eighths_of_the_depth():
    for layers, at in ((32, 28), (40, 35), (28, 24)):
        stages = ToDRE().stages(tokenprune.plan.parse.Budget(64), dataclasses.replace(LLAVA, decoder=layers))
        assert [stage.site for stage in stages] == ["input", f"layer:{at}"]
    for options, text in (({"tau": -1.0}, "tau must be"), ({"depth": 1.0}, "depth must be")):
        with pytest.raises(ValueError, match=text):
            ToDRE(**options)
