"""What a newcomer is told when something is off: whole sentences, with numbers that are theirs."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from _tiny import prompts, tiny_llava

import tokenprune
from tokenprune import ModelDepths, Pruner, Selection, Signal
from tokenprune.engine.vision_tower import TowerHooks
from tokenprune.plan.parse import parse_method


@dataclass
class Listed(Pruner):
    """A method of a user's own that returns something else than it should."""

    name = "listed"
    what: str = ""

    def score(self, view):
        return {
            "list": [[0.0] * view.num_tokens] * view.num_images,
            "flat": torch.zeros(view.num_tokens),
            "none": None,
        }[self.what]


@dataclass
class Chosen(Pruner):
    """A method of a user's own whose choice is no Selection."""

    name = "chosen"
    what: str = ""

    def select(self, view):
        indices = torch.arange(view.budget).expand(view.num_images, -1)
        return {"list": indices.tolist(), "tensor": indices, "none": None, "right": Selection(indices)}[self.what]


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (Listed(what="list"), r"Listed\.score must return one number for each visual token.*\(1, 36\).*a list"),
        (Listed(what="flat"), r"it returned a tensor \(36,\)"),
        (Listed(what="none"), "it returned a NoneType"),
        (Chosen(what="list"), r"Chosen\.select must return a tokenprune\.Selection, and it returned a list"),
        (Chosen(what="tensor"), "it returned a Tensor"),
        (Chosen(what="none"), "it returned a NoneType"),
        (Chosen(what="right"), ""),
    ],
)
def test_a_method_that_returns_something_else(method, says):
    model = tiny_llava()
    with tokenprune.applied(model, method, keep=9), torch.no_grad():
        if says:
            with pytest.raises(TypeError, match=says):
                model(**prompts([1]))
        else:
            model(**prompts([1]))


def test_an_average_that_was_asked_for_as_a_share_is_refused_as_a_share():
    """Where pictures have no fixed number of tokens a scale of 1000 is solved on, which nobody asked for."""
    depths = ModelDepths(vision=4, feature=2, decoder=8)
    for tokens in (None, 576):
        with pytest.raises(ValueError) as refused:
            parse_method("fastv", average=0.1).plan(depths, tokens)
        said = str(refused.value)
        assert "0.1 of the visual tokens" in said and "1000" not in said and "576" not in said
        assert "goes from 0.25" in said and "to 1.000 of them" in said
    with pytest.raises(ValueError, match=r"an average of 60 tokens of 576: .* goes from 14\d\.\d to 576\.0\."):
        parse_method("fastv", average=60).plan(depths, 576)


def test_a_tower_without_signals_says_so():
    adapter = SimpleNamespace(vision=SimpleNamespace(signals=()), model=torch.nn.Identity())
    with pytest.raises(ValueError, match=r"gives no 'cls_attention'; it gives none: Identity has no .+\w\.$"):
        TowerHooks._check(SimpleNamespace(adapter=adapter), Signal("cls_attention", 0))
