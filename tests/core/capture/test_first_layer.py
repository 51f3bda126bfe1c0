"""Attention of decoder layer 0, read at "input" before the layer runs, is what the layer then does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from _families import BUILDERS, batch_of, family
from _tiny import prompts, tiny_llava
from masked_reference import relative_error
from torch import Tensor

import tokenprune
from tokenprune.engine.layer_check import check_decoder_reads
from tokenprune.interfaces.pruner import Pruner, Stage
from tokenprune.interfaces.selection import Selection
from tokenprune.interfaces.signals import INSTRUCTION_ATTENTION, Signal
from tokenprune.seams import cache_argument, cache_in

SEEN: dict[str, list[Tensor]] = {}


@dataclass
class Probe(Pruner):
    """Keeps all and writes down the signal, by site."""

    name: ClassVar[str] = "probe"
    adaptive: ClassVar[bool] = True
    default_scope: ClassVar[str] = "visual"

    def signals(self, tower: Any) -> tuple[Signal, ...]:
        return (Signal(INSTRUCTION_ATTENTION, 0),)

    def select(self, view: Any) -> Selection:
        SEEN.setdefault(view.site, []).extend(view.signal(INSTRUCTION_ATTENTION, 0))
        return Selection(torch.arange(view.num_tokens).expand(view.num_images, -1))


@pytest.fixture(autouse=True)
def _nothing_seen():
    SEEN.clear()


@pytest.mark.parametrize("layout", ["ragged_left", "ragged_right"])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_it_equals_the_rows_of_eager_attention(name: str, layout: str) -> None:
    model, batch = family(name, "eager"), batch_of(name, layout)
    rows: list[Tensor] = []
    with tokenprune.applied(model, Probe(), keep=1.0) as handle, torch.no_grad():
        attention = handle.adapter.attention(handle.adapter.layers[0])
        hook = attention.register_forward_hook(lambda _, args, output: rows.append(output[1]))
        model(**batch)
        hook.remove()
        prompt = handle._engine.last
    (mass,) = rows
    expected = []
    counts = prompt.text_after_visual()
    for span in prompt.layout.spans:
        attended = batch["attention_mask"][span.sample].nonzero()[:, 0]
        text = attended[len(attended) - max(counts[span.sample], 1) :]
        offsets = span.visual.offsets
        places = span.places if offsets is None else span.places[offsets]
        expected.append(mass[span.sample][:, text].mean(dim=(0, 1))[places])
    # images of one shape were asked about together
    left = list(SEEN["input"])
    for one in expected:
        errors = [relative_error(other, one) if other.shape == one.shape else 1.0 for other in left]
        assert min(errors) < 1e-5
        left.pop(errors.index(min(errors)))
    assert not left


@pytest.mark.parametrize("policy", ["keep", "compact"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_behind_a_cut_in_the_tower_it_sees_what_is_left(side: str, policy: str) -> None:
    """Layer 0 is read a second time as it ran, by a stage behind it."""
    plan = [
        {"at": "vision:1", "prune": "uniform", "keep": 12, "positions": policy},
        {"at": "input", "prune": Probe(positions=policy), "keep": 1.0},
        {"at": "layer:1", "prune": Probe(), "keep": 1.0},
    ]
    model = tiny_llava()
    with tokenprune.applied(model, plan), torch.no_grad():
        model(**prompts([1, 3, 0, 2], side))
    assert len(SEEN["input"]) == 6 and all(one.shape == (12,) for one in SEEN["input"])
    for one, other in zip(SEEN["input"], SEEN["layer:1"]):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("policy", ["keep", "compact"])
def test_a_second_turn_sees_the_keys_of_a_first_that_was_cut(policy: str) -> None:
    plan = [
        {"at": "vision:1", "prune": "uniform", "keep": 9, "positions": policy},
        {"at": "input", "prune": Probe(positions=policy), "keep": 1.0},
        {"at": "layer:1", "prune": Probe(), "keep": 1.0},
    ]
    model, first, second = tiny_llava(), prompts([1, 2]), prompts([2, 1], seed=4)
    with tokenprune.applied(model, plan), torch.no_grad():
        cache = cache_in(model(**first))
        SEEN.clear()
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
        model(**{**second, "attention_mask": mask}, **cache_argument(cache))
    assert len(SEEN["input"]) == 3
    for one, other in zip(SEEN["input"], SEEN["layer:1"]):
        assert relative_error(one, other) < 1e-5


def test_a_decoder_that_changes_its_embeddings_is_refused() -> None:
    model = tiny_llava()
    adapter = tokenprune.api.adapter_for(model)
    from tokenprune.interfaces.budget import Budget

    stages = [Stage("input", Probe(), Budget(1.0))]
    check_decoder_reads(adapter, stages)
    decoder = model.model.language_model
    inner = type(decoder).forward
    decoder.forward = lambda **given: inner(decoder, **{**given, "inputs_embeds": given["inputs_embeds"] * 2})
    with pytest.raises(ValueError, match="changed before they enter it"):
        check_decoder_reads(adapter, stages)
