"""TOPS against its card: the greedy in plain Python, and the budget arithmetic of its schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _views import make_view

from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths
from tokenprune.interfaces.signals import CLS_ATTENTION, Signal
from tokenprune.kernels.greedy_coverage import cosines
from tokenprune.methods._preservation import _batched, greedy_preservation
from tokenprune.methods.tops import Tops


def by_hand(cosine: np.ndarray, r: np.ndarray, k: int, alpha: float, lam: float, mean: bool) -> tuple[list[int], float]:
    """The order of choice, and by how much the closest decision was won."""
    n = len(cosine)
    order, gap = [int(r.argmax())], 1.0
    while len(order) < k:
        left = [i for i in range(n) if i not in order]
        m = [max(cosine[i, j] for j in order) for i in range(n)]
        div = {i: max(0.0, 1 - m[i]) for i in left}
        cov = {i: sum(max(0.0, cosine[i, j] - m[j]) for j in left) for i in left}

        def scaled(values: dict[int, float]) -> dict[int, float]:
            if mean:
                middle = sum(values.values()) / len(values)
                return {i: v / middle if middle > 1e-12 else 0.0 for i, v in values.items()}
            low, high = min(values.values()), max(values.values())
            return {i: (v - low) / (high - low) if high > low else 0.0 for i, v in values.items()}

        terms = (scaled({i: float(r[i]) for i in left}), scaled(div), scaled(cov))
        score = {i: terms[0][i] + alpha * terms[1][i] + lam * terms[2][i] for i in left}
        ranked = sorted(left, key=lambda i: (-score[i], i))
        if len(ranked) > 1:
            gap = min(gap, score[ranked[0]] - score[ranked[1]])
        order.append(ranked[0])
    return order, gap


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize(("alpha", "lam"), [(0.5, 0.5), (0.0, 0.4), (0.3, 0.0), (0.0, 0.0)])
def test_equals_the_card(mean: bool, alpha: float, lam: float) -> None:
    compared = 0
    for seed in range(60):
        draw = torch.Generator().manual_seed(seed)
        grid = (2 + seed % 4, 2 + seed % 5)
        n = grid[0] * grid[1]
        features, r = torch.randn(2, n, 12, generator=draw), torch.rand(2, n, generator=draw)
        k = 1 + seed * 5 % (n - 1)
        method = Tops(diversity=alpha, coverage=lam, scale="mean" if mean else "extremes")
        view = make_view(method, grid, k, images=2, features=features, signals={Signal(CLS_ATTENTION, 4): r})
        order = method.order(view)
        for image in range(2):
            unit = torch.nn.functional.normalize(features[image].double(), dim=1).numpy()
            truth, gap = by_hand(unit @ unit.T, r[image].double().numpy(), k, alpha, lam, mean)
            if gap > 1e-5:
                compared += 1
                assert order[image].tolist() == truth, seed
        assert torch.equal(method.select(view).indices, order.sort(1).values)
    assert compared > 100


def test_special_cases_of_the_card() -> None:
    draw = torch.Generator().manual_seed(0)
    features, r = torch.randn(1, 30, 8, generator=draw), torch.rand(1, 30, generator=draw)
    table = cosines(features)
    assert greedy_preservation(features, r, 9, 0, 0)[0].tolist() == r[0].topk(9).indices.tolist()
    assert sorted(greedy_preservation(features, r, 30, 0.5, 0.5)[0].tolist()) == list(range(30))
    one = greedy_preservation(features, r, 12, 0.5, 0.5)
    assert torch.equal(one, greedy_preservation(features, 8 * r, 12, 0.5, 0.5)), "relevance has no scale"
    assert torch.equal(greedy_preservation(features, r, 20, 0.5, 0.5)[:, :12], one), "nested"
    # farthest points, where relevance says nothing
    chosen = greedy_preservation(features, torch.ones(1, 30), 10, 0.5, 0)[0].tolist()
    for step in range(1, 10):
        far = {i: max(float(table[0, i, j]) for j in chosen[:step]) for i in range(30) if i not in chosen[:step]}
        assert chosen[step] == min(far, key=lambda i: (far[i], i))


def test_copies_of_a_kept_token_come_last() -> None:
    features = torch.eye(4).repeat_interleave(2, 0)[None]
    order = greedy_preservation(features, torch.ones(1, 8), 8, 0.5, 0.5)[0]
    assert sorted((order[:4] // 2).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(("depth", "mean"), [(32, 1.1875), (40, 1.1875), (28, 8192 / 28 / 256)])
def test_mean_over_the_layers_is_that_of_the_card(depth: int, mean: float) -> None:
    stages = Tops().stages(Budget(256), ModelDepths(24, 22, depth))
    ends = [*(stage.depth for stage in stages[1:]), depth]
    kept, before, total = [stage.budget.tokens(1296) for stage in stages], 0, 0
    for count, end in zip(kept, ends, strict=True):
        total += count * (end - before)
        before = end
    assert total / depth == pytest.approx(mean * 256, rel=1e-3)
    if depth == 28:
        assert kept == [512, 281, 77], "as published for 1296 tokens"


def test_one_stage_and_tiny_budgets() -> None:
    depths = ModelDepths(24, 22, 32)
    assert len(Tops(stages_in_decoder=False).stages(Budget(64), depths)) == 1
    assert [stage.budget.tokens(576) for stage in Tops().stages(Budget(1), depths)] == [2, 1, 1]
    assert [stage.budget.tokens(576) for stage in Tops().stages(Budget(500), depths)] == [576, 500, 125]
    with pytest.raises(ValueError, match="diversity"):
        Tops(diversity=-0.1)


@pytest.mark.parametrize("mean", [True, False])
def test_gains_kept_up_to_date_are_gains_taken_anew(mean: bool) -> None:
    """Many steps over more rows than one block, also with copies and opposites."""
    for seed in range(12):
        draw = torch.Generator().manual_seed(seed)
        features = torch.randn(2, 300, 24, generator=draw)
        if seed % 2:  # copies and opposites
            features[:, 150:] = (
                features[:, :150] * torch.tensor([1.0, -2.0])[torch.randint(2, (150, 1), generator=draw)]
            )
        r = torch.rand(2, 300, generator=draw)
        chosen = greedy_preservation(features, r, 120, 0.5, 0.5, mean)
        table = cosines(features)
        for image in range(2):
            # each choice has the highest score, all three terms anew, up to rounding
            x, order = table[image].double(), chosen[image].tolist()
            for step in (1, 2, 60, 119):
                left = torch.ones(300, dtype=torch.bool)
                left[order[:step]] = False
                m = x[order[:step]].amax(0)
                cov = (x - m[:, None]).clamp_min(0)[left].sum(0)
                terms = []
                for values in (r[image].double(), (1 - m).clamp_min(0), cov):
                    own = values[left]
                    terms.append(own / own.mean() if mean else (own - own.min()) / (own.max() - own.min()))
                score = terms[0] + 0.5 * terms[1] + 0.5 * terms[2]
                won = score[left.nonzero()[:, 0].tolist().index(order[step])]
                assert float(won) > float(score.max()) - 1e-5
        if seed % 2 == 0:
            assert torch.equal(_batched(table, r, 120, 0.5, 0.5, mean), chosen)


@pytest.mark.parametrize("case", ["alike", "zeros", "opposite", "no relevance"])
@pytest.mark.parametrize("mean", [True, False])
def test_features_that_say_nothing(case: str, mean: bool) -> None:
    features, r = torch.ones(1, 12, 4), torch.arange(12.0)[None].flip(1)
    if case == "zeros":
        features = torch.zeros(1, 12, 4)
    elif case == "opposite":
        features[:, ::2] = -1
    elif case == "no relevance":
        r = torch.zeros(1, 12)
    order = greedy_preservation(features, r, 12, 0.5, 0.5, mean)
    assert sorted(order[0].tolist()) == list(range(12))
    assert torch.equal(order, _batched(cosines(features), r, 12, 0.5, 0.5, mean))
    if case != "opposite":
        assert order[0].tolist() == list(range(12)), "by relevance, then by index"
