import math

import pytest
import torch
from _views import make_view

from tokenprune.interfaces.selection import fit_grid
from tokenprune.methods.pool import Pool


@pytest.mark.parametrize(("grid", "budget"), [((6, 6), 9), ((6, 5), 7), ((7, 3), 20), ((1, 9), 4), ((5, 8), 1)])
def test_each_token_is_the_mean_of_its_cell(grid: tuple[int, int], budget: int) -> None:
    view = make_view(Pool(), grid, budget, images=2, width=3)
    rows, cols = fit_grid(grid, budget)
    selection = Pool().select(view)
    assert selection.features is not None
    raster = view.features.double().view(2, *grid, 3)
    for image in range(2):
        for i in range(rows):
            for j in range(cols):
                # a cell reaches from the last edge at or before its start to the first at or behind its end
                top, bottom = i * grid[0] // rows, math.ceil((i + 1) * grid[0] / rows)
                left, right = j * grid[1] // cols, math.ceil((j + 1) * grid[1] / cols)
                mean = raster[image, top:bottom, left:right].mean(dim=(0, 1))
                torch.testing.assert_close(selection.features[image, i * cols + j].double(), mean)
                place = int(selection.indices[image, i * cols + j])
                assert top <= place // grid[1] < bottom and left <= place % grid[1] < right


def test_budgets_of_the_paper_grid() -> None:
    for budget, count in ((64, 64), (128, 121), (144, 144), (192, 192)):
        assert Pool().select(make_view(Pool(), (24, 24), budget, images=1, width=2)).indices.shape == (1, count)


def test_equal_tokens_stay_as_they_are() -> None:
    features = torch.randn(2, 1, 5).expand(2, 35, 5).half()
    pooled = Pool().select(make_view(Pool(), (5, 7), 8, features=features)).features
    assert pooled is not None
    assert torch.equal(pooled, features[:, : pooled.shape[1]])


def test_half_precision_sums_do_not_overflow() -> None:
    features = torch.full((1, 64, 2), 60000.0).half()
    pooled = Pool().select(make_view(Pool(), (8, 8), 1, features=features)).features
    assert pooled is not None and pooled.tolist() == [[[60000.0, 60000.0]]]


def test_gradients_reach_all_tokens() -> None:
    features = torch.randn(1, 30, 4, requires_grad=True)
    pooled = Pool().select(make_view(Pool(), (6, 5), 7, features=features)).features
    assert pooled is not None
    pooled.sum().backward()
    assert features.grad is not None and bool((features.grad > 0).all())
