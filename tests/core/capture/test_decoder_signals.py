"""Signals of a decoder layer that has run: read from its KV cache where that has them, else projected anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from _families import BUILDERS, batch_of, family
from _tiny import prompts, tiny_llava
from masked_reference import relative_error
from torch import Tensor

import tokenprune
from tokenprune.capture.decoder_attention import DecoderSignals, LayerInput
from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.signals import LAST_ATTENTION, Signal
from tokenprune.methods.fastv import FastV
from tokenprune.methods.todre import DropAllStage
from tokenprune.seams import cache_argument, cache_in

PLAN = [
    {"at": "input", "prune": "random", "keep": 20},
    {"at": "layer:2", "prune": "fastv", "keep": 12},
    {"at": "layer:3", "prune": DropAllStage(tau=0.0), "keep": 1.0},
]
SIGNALS = ("last_attention", "instruction_attention", "text_to_visual", "visual_to_text", "decoder_value_norm",
           "last_value_similarity", "last_visual_attention")  # fmt: skip


@contextmanager
def both_ways(read: list[bool], errors: list[float], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every layer that is read at a cut is read a second time without its cache, and all signals are compared."""
    begin = DecoderSignals.__init__

    def spy(self: Any, adapter: Any, given: LayerInput, prompt: Any) -> None:
        begin(self, adapter, given, prompt)
        read.append(given.left is not None)
        anew = DecoderSignals.__new__(DecoderSignals)
        begin(anew, adapter, LayerInput(*[getattr(given, name) for name in FIELDS]), prompt)
        for index, alive in enumerate(prompt.alive):
            if alive.count == 0:
                continue
            for name in SIGNALS:
                one, other = (made.value(name, index, alive.places) for made in (self, anew))
                assert one.shape == other.shape and bool(other.isfinite().all())
                errors.append(relative_error(one, other) if float(other.norm()) else float(one.norm()))
        assert (self.flops < anew.flops) == (given.left is not None), "keys and values are not projected twice"

    with monkeypatch.context() as patch:
        patch.setattr(DecoderSignals, "__init__", spy)
        yield


FIELDS = ("module", "hidden", "rotation", "attended", "keys", "keys_seen")


def run(model: Any, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, **more: Any) -> list[bool]:
    read: list[bool] = []
    errors: list[float] = []
    with tokenprune.applied(model, PLAN), torch.no_grad(), both_ways(read, errors, monkeypatch):
        model(**batch, **more)
    assert errors and max(errors) < 1e-6
    return read


@pytest.mark.parametrize("layout", ["ragged_left", "ragged_right"])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_a_cache_gives_what_the_projections_would(name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(family(name), batch_of(name, layout), monkeypatch) == [True, True]


def test_a_second_turn_reads_the_keys_of_the_first_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, first = tiny_llava(), prompts([1, 2])
    with tokenprune.applied(model, PLAN), torch.no_grad():
        cache = cache_in(model(**first))
    second = prompts([2, 1], seed=4)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
    assert run(model, {**second, "attention_mask": mask}, monkeypatch, **cache_argument(cache)) == [True, True]


def test_without_a_cache_the_layer_is_projected_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tiny_llava(), prompts([1, 2]), monkeypatch, use_cache=False) == [False, False]


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part[:, :, 1:], lambda part: part.double(), lambda part: part.to("meta"),
        lambda part: torch.empty(0), lambda part: None,
    ],
    ids=["shorter", "other dtype", "other device", "quantized", "not there"],
)  # fmt: skip
def test_a_cache_that_holds_something_else_is_not_read(change: Any) -> None:
    class Layer:
        keys, values = torch.zeros(1, 2, 9, 4), torch.ones(1, 2, 9, 4)

    class Cache:
        layers = [None, Layer()]

    given = LayerInput(
        None, torch.zeros(1, 5, 8), (torch.ones(1), torch.ones(1)), None, torch.zeros(1, 2, 4, 4), None, cache=Cache
    )
    left = given.after(1).left
    assert left is not None and torch.equal(left[1], Layer.values)
    Layer.values = change(Layer.values)
    alone = dataclasses.replace(given, cache=None)
    assert given.after(1) is given and alone.after(1) is alone


@pytest.mark.parametrize("cached", [True, False])
def test_a_cut_just_before_the_layer_that_is_read(cached: bool) -> None:
    """FastV at layers 2 and 3: the second reads layer 2 as it ran, on the rows that the first had shortened."""
    seen: list[tuple[Tensor, Tensor]] = []

    @dataclass
    class Watched(FastV):
        def select(self, view: Any) -> Any:
            (signal,) = view.signals
            seen.append((view.tokens, view.signals[signal]))
            return super().select(view)

    plan = [{"at": "layer:2", "prune": "fastv", "keep": 12}, {"at": "layer:3", "prune": Watched(), "keep": 6}]
    model, batch = tiny_llava(attention="eager"), prompts([2, 1])
    with tokenprune.applied(model, plan) as handle, torch.no_grad():
        matrix = model(**batch, output_attentions=True, use_cache=cached).attentions[2].mean(1)
        spans = handle.last.layout.spans
    ((tokens, found),) = seen
    lengths, expected = batch["attention_mask"].sum(1) - torch.tensor([24 + 24, 24]), []
    assert matrix.shape[-1] == int(lengths.max())
    for span, left in zip(spans, tokens):
        before = [other for other in spans if other.sample == span.sample and other.image < span.image]
        pad = matrix.shape[-1] - int(lengths[span.sample])
        first = int(span.places[0]) - int((batch["attention_mask"][span.sample] == 0).sum()) - 24 * len(before)
        assert len(left) == 12
        expected.append(matrix[span.sample, -1, pad + first : pad + first + 12])
    assert relative_error(found, torch.stack(expected)) < 1e-6


def test_a_decoder_signal_before_the_decoder():
    @dataclass
    class Mine(Pruner):
        name: ClassVar[str] = "mine"

        def signals(self, tower):
            return (Signal(LAST_ATTENTION, 1),)

    with pytest.raises(ValueError, match="was asked for at 'input'; a stage there reads layer 0"):
        tokenprune.apply(tiny_llava(), Mine(), keep=4)
    with pytest.raises(ValueError, match="of layer 0, at 'input' only, and was asked for at 'vision:1'"):
        tokenprune.apply(tiny_llava(), {"at": "vision:1", "prune": Mine(), "keep": 4})
