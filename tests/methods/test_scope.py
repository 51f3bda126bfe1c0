"""SCOPE against its card: plain greedy in Python, with the gain of every token anew at every step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from _views import TOWER, make_view

from tokenprune.interfaces.signals import CLS_ATTENTION, TOWER_STATES, Signal
from tokenprune.kernels.greedy_coverage import greedy_coverage
from tokenprune.methods.scope import Scope

LAYER = TOWER.feature_layer


def plain_order(cosine: np.ndarray, a: np.ndarray, k: int, add: bool) -> list[int]:
    """Card steps 2 and 3, and our order where nothing is gained any more."""
    n = len(cosine)
    covered, order = [0.0] * n, []
    for _ in range(k):
        free = [v for v in range(n) if v not in order]
        gain = {v: sum(max(0.0, float(cosine[u, v]) - covered[u]) for u in range(n)) for v in free}
        score = {v: gain[v] + a[v] if add else gain[v] * a[v] for v in free}
        if not add and max(score.values()) <= 0:
            score = gain if max(gain.values()) > 0 else {v: float(a[v]) for v in free}
        best = max(free, key=lambda v: (score[v], -v))
        order.append(best)
        covered = [max(m, float(cosine[u, best])) for u, m in enumerate(covered)]
    return order


def exact_states(count: int, draw: torch.Generator) -> torch.Tensor:
    """Rows of length 4 whose cosines are whole sixteenths: sums are exact in fp32, and ties are many."""
    return 2.0 * torch.randint(0, 2, (2, count, 16), generator=draw) - 1


@pytest.mark.parametrize("rule", ["product", "sum"])
@pytest.mark.parametrize("alpha", [1.0, 0.0, 2.0])
def test_equals_plain_greedy_index_for_index_ties_included(rule: str, alpha: float) -> None:
    for seed in range(120):
        draw = torch.Generator().manual_seed(seed)
        grid = (2 + seed % 4, 2 + seed % 5)
        n = grid[0] * grid[1]
        k = 1 + seed * 3 % (n - 1)
        states, attention = exact_states(n, draw), torch.randint(0, 9, (2, n), generator=draw) / 8
        method = Scope(alpha=alpha, rule=rule)
        signals = {Signal(CLS_ATTENTION, LAYER): attention, Signal(TOWER_STATES, LAYER): states}
        view = make_view(method, grid, k, images=2, signals=signals)
        order, kept = method.order(view), method.select(view).indices
        for image in range(2):
            cosine = (states[image] @ states[image].T / 16).double().numpy()
            summed = TOWER.num_heads if rule == "sum" else 1  # over heads, as in the code: a scale
            truth = plain_order(cosine, ((summed * attention[image]) ** alpha).double().numpy(), k, rule == "sum")
            assert order[image].tolist() == truth, seed
            assert kept[image].tolist() == sorted(truth)


def test_without_cls_the_tokens_of_the_decoder_are_covered() -> None:
    tower = dataclasses.replace(TOWER, has_cls=False)
    method = Scope(alpha=0.0)
    features = exact_states(30, torch.Generator().manual_seed(2))
    view = make_view(method, (5, 6), 9, images=2, features=features, tower=tower)
    assert not method.signals(tower)
    assert torch.equal(method.order(view), greedy_coverage(features, torch.ones(2, 30), 9))
    assert method.notes(tower) and not method.notes(TOWER)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="alpha"):
        Scope(alpha=-1)
    with pytest.raises(ValueError, match="Did you mean"):
        Scope(rule="produkt")
