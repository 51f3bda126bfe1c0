import dataclasses
from typing import Any

import pytest
import torch
from _views import TOWER, make_view
from torch import Tensor

from tokenprune.interfaces.signals import CLS_ATTENTION, Signal
from tokenprune.methods.todre import ToDRE

NO_CLS = dataclasses.replace(TOWER, has_cls=False)
OBJECTIVES = ["max_sum", "k_center"]


def cosines(features: Tensor) -> Tensor:
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    return unit @ unit.T


def by_hand(features: Tensor, pivot: int, k: int, objective: str) -> tuple[list[int], float]:
    """The pseudocode of the card for one image: running similarity, +infinity at the chosen, smallest next."""
    similarity = cosines(features).tolist()
    running, chosen, gap = list(similarity[pivot]), [pivot], 1.0
    running[pivot] = float("inf")
    while len(chosen) < k:
        order = sorted(range(len(running)), key=lambda i: (running[i], i))
        chosen.append(order[0])
        gap = min(gap, running[order[1]] - running[order[0]])
        join = (lambda a, b: a + b) if objective == "max_sum" else max
        running = [join(a, b) for a, b in zip(running, similarity[order[0]])]
        running[order[0]] = float("inf")
    return chosen, gap


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equals_the_definition(objective: str) -> None:
    compared = 0
    for seed in range(100):
        method = ToDRE(objective=objective)
        grid = (2 + seed % 4, 2 + seed % 5)
        count = grid[0] * grid[1]
        features = torch.randn(2, count, 3 + seed % 11, generator=torch.Generator().manual_seed(seed))
        view = make_view(method, grid, 1 + seed * 13 % (count - 1), seed=seed, images=2, features=features)
        kept = method.select(view).indices
        for image in range(2):
            pivot = int(view.signal(CLS_ATTENTION, TOWER.num_layers - 1)[image].argmax())
            chosen, gap = by_hand(features[image], pivot, view.budget, objective)
            if gap > 1e-5:
                compared += 1
                assert kept[image].tolist() == sorted(chosen)
    assert compared > 180


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_pivot_stays_whatever_the_budget(objective: str) -> None:
    method = ToDRE(objective=objective)
    view = make_view(method)
    pivot = view.signal(CLS_ATTENTION, 5).argmax(dim=1)
    for budget in range(1, 30):
        kept = method.select(dataclasses.replace(view, budget=budget)).indices
        assert bool((kept == pivot[:, None]).any(dim=1).all())
        if budget == 1:
            assert torch.equal(kept[:, 0], pivot)


@pytest.mark.parametrize("options", [{}, {"objective": "k_center"}, {"pivot": "center"}, {"pivot": "random"}])
def test_the_length_of_a_token_does_not_matter(options: dict[str, Any]) -> None:
    method = ToDRE(**options)
    view = make_view(method, features=torch.randn(3, 30, 12))
    scaled = view.features * 2.0 ** torch.randint(-5, 6, (3, 30, 1))
    other = method.select(dataclasses.replace(view, features=scaled)).indices
    assert torch.equal(other, method.select(view).indices)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_token_of_each_orthogonal_group(objective: str) -> None:
    groups = torch.randint(5, (3, 30)).sort(dim=1).values
    groups[:, :5] = torch.arange(5)
    method = ToDRE(objective=objective)
    view = make_view(method, budget=5, features=torch.eye(5)[groups])
    kept = groups.gather(1, method.select(view).indices)
    assert torch.equal(kept.sort(dim=1).values, torch.arange(5).expand(3, -1))


def test_every_addition_has_the_smallest_sum() -> None:
    """The card's own check, on the set that grows with the budget."""
    method = ToDRE()
    view = make_view(method, (4, 5), features=torch.randn(1, 20, 8), images=1)
    similarity = cosines(view.features[0])
    before: set[int] = set()
    for budget in range(1, 20):
        kept = set(method.select(dataclasses.replace(view, budget=budget)).indices[0].tolist())
        assert before < kept
        if before:
            sums = similarity[:, sorted(before)].sum(dim=1)
            (added,) = kept - before
            assert all(sums[added] <= sums[i] + 1e-6 for i in range(20) if i not in kept)
        before = kept


def test_signals_are_the_last_block_and_only_for_that_pivot() -> None:
    assert ToDRE().signals(TOWER) == (Signal(CLS_ATTENTION, 5),)
    assert ToDRE().signals(NO_CLS) == ()
    assert ToDRE(pivot="center").signals(TOWER) == ()
    assert ToDRE(pivot="random").signals(TOWER) == ()


def test_without_cls_the_token_nearest_the_mean_starts() -> None:
    features = torch.randn(3, 30, 6) + 1
    view = make_view(ToDRE(), budget=1, tower=NO_CLS, features=features)
    unit = features.double() / features.double().norm(dim=2, keepdim=True)
    mean = unit.mean(dim=1, keepdim=True)
    nearest = torch.cosine_similarity(unit, mean, dim=2).argmax(dim=1)
    assert torch.equal(ToDRE().select(view).indices[:, 0], nearest)
    assert torch.equal(ToDRE(pivot="center").select(view).indices[:, 0], nearest)


def test_a_random_pivot_depends_on_seed_and_image() -> None:
    view = make_view(ToDRE(), budget=1, images=40)
    first = ToDRE(pivot="random").first(view)
    assert torch.equal(ToDRE(pivot="random").select(view).indices[:, 0], first)
    assert len(set(first.tolist())) > 15
    assert not torch.equal(ToDRE(pivot="random", seed=1).first(view), first)


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="max_sum, k_center"):
        ToDRE(objective="max_min")
    with pytest.raises(ValueError, match="cls, center, random"):
        ToDRE(pivot="farthest")


@pytest.mark.parametrize("options", [{}, {"pivot": "center"}])
def test_nan_features_are_refused(options: dict[str, Any]) -> None:
    view = make_view(ToDRE())
    view.features[0, 3, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        ToDRE(**options).select(view)
