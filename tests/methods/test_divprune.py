import dataclasses

import pytest
import torch
from _views import make_view
from torch import Tensor

from tokenprune.methods.divprune import DivPrune


def by_hand(features: Tensor, k: int) -> tuple[list[int], float]:
    """One image as the card tells it: distances anew at each step, and by how much the closest decision was won."""
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    distance = (1 - unit @ unit.T).tolist()
    n = len(distance)
    gap = 2.0

    def farthest(values: dict[int, float]) -> int:
        nonlocal gap
        order = sorted(values, key=lambda i: (-values[i], i))
        if len(order) > 1:
            gap = min(gap, values[order[0]] - values[order[1]])
        return order[0]

    # the second smallest of a column is the nearest neighbour other than itself
    chosen = [farthest({i: sorted(distance[j][i] for j in range(n))[1] for i in range(n)})]
    while len(chosen) < k:
        chosen.append(farthest({i: min(distance[i][j] for j in chosen) for i in range(n) if i not in chosen}))
    return chosen, gap


def test_equals_the_definition() -> None:
    compared = 0
    for seed in range(150):
        grid = (2 + seed % 4, 2 + seed % 5)
        count = grid[0] * grid[1]
        features = torch.randn(2, count, 3 + seed % 11, generator=torch.Generator().manual_seed(seed))
        view = make_view(DivPrune(), grid, 1 + seed * 13 % (count - 1), features=features)
        kept = DivPrune().select(view).indices
        for image in range(2):
            chosen, gap = by_hand(features[image], view.budget)
            if gap > 1e-5:
                compared += 1
                assert kept[image].tolist() == sorted(chosen)
    assert compared > 200  # two tokens that are each other's nearest often tie for the first place


def test_chosen_tokens_are_spread_better_than_random_ones() -> None:
    features = torch.randn(1, 100, 6)
    kept = DivPrune().select(make_view(DivPrune(), (10, 10), 12, features=features)).indices[0]

    def closest(places: Tensor) -> float:
        unit = features[0, places] / features[0, places].norm(dim=1, keepdim=True)
        return float((unit @ unit.T - 2 * torch.eye(12)).max())

    assert closest(kept) < min(closest(torch.randperm(100)[:12]) for _ in range(50))


def test_duplicates_are_picked_once() -> None:
    """More tokens wanted than there are different ones: the official rule would pick a chosen one again."""
    features = torch.eye(3)[torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])].unsqueeze(0)
    kept = DivPrune().select(make_view(DivPrune(), (2, 4), 5, features=features)).indices
    assert kept.tolist() == [[0, 1, 2, 3, 4]]


def test_a_row_of_zeros_is_far_from_every_row() -> None:
    alike = torch.ones(9, 8) + 0.01 * torch.arange(72).view(9, 8) / 72
    alike[[2, 5]] = 0
    kept = DivPrune().select(make_view(DivPrune(), (3, 3), 3, features=alike[None])).indices[0].tolist()
    assert {2, 5} <= set(kept), "at distance 1 from the others and from each other"


def test_larger_budgets_keep_what_smaller_ones_kept() -> None:
    view = make_view(DivPrune(), features=torch.randn(2, 30, 9))
    kept = [set(DivPrune().select(dataclasses.replace(view, budget=k)).indices[1].tolist()) for k in range(1, 30)]
    assert all(small < large for small, large in zip(kept, kept[1:]))


def test_nan_features_are_refused() -> None:
    view = make_view(DivPrune())
    view.features[2, 29, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        DivPrune().select(view)
