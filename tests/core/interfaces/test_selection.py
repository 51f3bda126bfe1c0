"""What a method may answer, and the helpers that methods rank and shrink with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.interfaces.selection import Selection, fit_grid, grid_places, topk_indices


@settings(max_examples=200)
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


@settings(max_examples=200)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 200))
def test_small_rasters_fit_the_budget_and_stand_in_the_big_one(rows, cols, budget):
    height, width = fit_grid((rows, cols), budget)
    assert 1 <= height <= rows and 1 <= width <= cols and height * width <= budget
    places = grid_places((rows, cols), (height, width))
    assert len(set(places)) == height * width and places == sorted(places) and places[-1] < rows * cols
    if budget >= rows * cols:
        assert (height, width) == (rows, cols)
