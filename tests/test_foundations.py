"""Registry, ledger, selection and layout: the small parts that everything stands on."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.hooks import Ledger
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.intervention import Intervention
from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, fit_grid, grid_places, topk_indices
from tokenprune.interfaces.visual import one_raster
from tokenprune.registry import INTERVENTIONS, METHODS, MODELS, Registry, UnknownName
from tokenprune.state.prompt_layout import build_layout


def test_names_come_from_files_and_importing_them_is_lazy():
    assert {"random", "uniform", "pool", "downsample", "vtc_cls", "todre", "divprune", "holov", "oracle"} <= set(
        METHODS.names()
    )
    assert "llava" in MODELS.names() and "_base" not in MODELS.names()
    assert all(METHODS.describe(name) for name in METHODS.names())
    code = "import sys, tokenprune; tokenprune.list_methods(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_registry_refuses_bad_and_taken_names():
    registry = Registry("method", "tokenprune.methods")
    with pytest.raises(ValueError, match="lower snake case"):
        registry.register("Foo_")
    with pytest.raises(ValueError, match="taken by the built-in"):

        @registry.register("random")
        class Other:
            pass

    with pytest.raises(UnknownName, match="Did you mean 'random'"):
        registry.get("randm")

    @registry.register("mine")
    class Mine:
        """One line."""

    assert registry.get("mine") is Mine and registry.describe("mine") == "One line."
    Twin = type("Twin", (), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match="is taken by"):
        registry.register("mine")(Twin)


@pytest.mark.parametrize(("registry", "base"), [(METHODS, Pruner), (INTERVENTIONS, Intervention), (MODELS, Adapter)])
def test_a_registry_takes_only_what_derives_from_its_base_class(registry, base):
    before = registry.names()
    message = f"The {registry.kind} 'stranger' must be a class that derives from tokenprune.{base.__name__}, got "
    with pytest.raises(TypeError, match=re.escape(message) + ".*Stranger"):

        @registry.register("stranger")
        class Stranger:
            pass

    with pytest.raises(TypeError, match=re.escape(message) + "<function"):
        registry.register("stranger")(lambda view: view)
    assert registry.names() == before
    try:
        mine = registry.register("my_own")(type("MyOwn", (base,), {}))
        assert registry.get("my_own") is mine and mine.name == "my_own"
    finally:
        registry.unregister("my_own")


def test_the_ledger_undoes_in_reverse_and_finishes_even_if_an_entry_fails():
    class Thing:
        value = 1

    thing, ledger, order = Thing(), Ledger(), []
    ledger.set(thing, "value", 2)
    ledger.set(thing, "value", 3)
    ledger.add(lambda: order.append(thing.value))

    def fail():
        raise RuntimeError("first")

    ledger.add(fail)
    with pytest.raises(RuntimeError, match="first"):
        ledger.undo()
    assert order == [3] and thing.value == 1 and "value" not in vars(thing) and len(ledger) == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=3), st.integers(1, 6))
def test_topk_breaks_ties_by_the_lower_index(rows, k):
    found = topk_indices(torch.tensor(rows, dtype=torch.float32), k).tolist()
    for row, indices in zip(rows, found):
        assert indices == sorted(sorted(range(6), key=lambda i: (-row[i], i))[:k])


def test_topk_refuses_nan_and_bad_k():
    with pytest.raises(ValueError, match="NaN"):
        topk_indices(torch.tensor([[1.0, float("nan")]]), 1)
    for k in (0, 3):
        with pytest.raises(ValueError, match="1 <= k <= N"):
            topk_indices(torch.ones(1, 2), k)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([[2, 1]], "strictly increasing"),
        ([[1, 1]], "strictly increasing"),
        ([[0, 9]], "in \\[0, 4"),
        ([[-1, 0]], "in \\[0, 4"),
    ],
)
def test_a_selection_out_of_order_or_range_is_refused(indices, message):
    with pytest.raises(ValueError, match=message):
        Selection(torch.tensor(indices)).validate(1, 4)


def test_a_selection_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[2, k\]"):
        Selection(torch.tensor([[0, 1]])).validate(2, 4)
    with pytest.raises(ValueError, match="int64"):
        Selection(torch.tensor([[0, 1]], dtype=torch.int32)).validate(1, 4)
    with pytest.raises(ValueError, match="Merged features"):
        Selection(torch.tensor([[0, 1]]), torch.zeros(1, 3, 8)).validate(1, 4)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 200))
def test_small_rasters_fit_the_budget_and_stand_in_the_big_one(rows, cols, budget):
    height, width = fit_grid((rows, cols), budget)
    assert 1 <= height <= rows and 1 <= width <= cols and height * width <= budget
    places = grid_places((rows, cols), (height, width))
    assert len(set(places)) == height * width and places == sorted(places) and places[-1] < rows * cols
    if budget >= rows * cols:
        assert (height, width) == (rows, cols)


def test_layout_of_a_ragged_batch():
    visual = torch.zeros(3, 12, dtype=torch.bool)
    visual[0, 2:6] = visual[0, 6:10] = visual[2, 0:4] = True
    layout = build_layout({"image": visual}, {"image": [one_raster((2, 2))] * 3})
    assert [(s.sample, s.image, s.places.tolist()) for s in layout.spans] == [
        (0, 0, [2, 3, 4, 5]), (0, 1, [6, 7, 8, 9]), (2, 0, [0, 1, 2, 3]),
    ]  # fmt: skip
    assert layout.visual_tokens == 12 and layout.order == (0, 1, 2)
    with pytest.raises(ValueError, match="hold 12 image tokens"):
        build_layout({"image": visual}, {"image": [one_raster((2, 2))] * 2})
