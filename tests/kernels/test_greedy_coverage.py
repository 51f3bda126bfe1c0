"""Greedy coverage against plain greedy in Python, with the gain of every token anew at every step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tokenprune.kernels import greedy_coverage as module
from tokenprune.kernels.greedy_coverage import _batched, cosines, gains, greedy_coverage, greedy_coverage_flops


def plain_order(cosine: np.ndarray, a: np.ndarray, k: int, add: bool) -> list[int]:
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


def exact(images: int, count: int, draw: torch.Generator) -> Tensor:
    """Rows of length 4 whose cosines are whole eighths: sums are exact in fp32, and ties are many."""
    return 2.0 * torch.randint(0, 2, (images, count, 16), generator=draw) - 1


@pytest.fixture(params=["table", "rows"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A table of all cosines, and rows that are computed when they are looked at, as for many tokens."""
    if request.param == "rows":
        monkeypatch.setattr(module, "_WHOLE", 0)
        monkeypatch.setattr(module, "_CELLS", 16 * 50)  # so that first gains come in parts
    return request.param


@pytest.mark.parametrize("add", [False, True])
def test_equals_plain_greedy_index_for_index_ties_and_zeros_included(add: bool, way: str) -> None:
    for seed in range(250):
        draw = torch.Generator().manual_seed(seed)
        n = 1 + seed % 27
        k = 1 + seed * 5 % n
        features = exact(2, n, draw)
        features[0, seed % n] = 0  # like itself alone
        weights = torch.randint(0, 4 if seed % 2 else 2, (2, n), generator=draw) / 8
        chosen = greedy_coverage(features, weights, k, add)
        assert torch.equal(_batched(cosines(features), weights, k, add), chosen)
        for image in range(2):
            cosine = (features[image] @ features[image].T / 16).double().numpy()
            np.fill_diagonal(cosine, 1)
            assert chosen[image].tolist() == plain_order(cosine, weights[image].double().numpy(), k, add), seed


def test_choices_are_nested_and_a_batch_is_its_images(way: str) -> None:
    draw = torch.Generator().manual_seed(0)
    features, weights = torch.randn(3, 60, 24, generator=draw), torch.rand(3, 60, generator=draw)
    whole = greedy_coverage(features, weights, 60)
    assert torch.equal(whole.sort(1).values, torch.arange(60).expand(3, -1))
    for k in (1, 9, 31):
        assert torch.equal(greedy_coverage(features, weights, k), whole[:, :k])
    for image in range(3):
        one = slice(image, image + 1)
        assert torch.equal(greedy_coverage(features[one], weights[one], 31), whole[one, :31])


def test_ways_agree_on_random_features(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(1)
    features, weights = torch.randn(2, 150, 40, generator=draw), torch.rand(2, 150, generator=draw)
    chosen = greedy_coverage(features, weights, 100)
    assert torch.equal(_batched(cosines(features), weights, 100, False), chosen)
    monkeypatch.setattr(module, "_WHOLE", 100)
    assert torch.equal(greedy_coverage(features, weights, 100), chosen)


def test_few_rows_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """What laziness is for: plain greedy would take 150 rows at each of 40 steps."""
    looked = []
    take = module._Rows.__getitem__
    monkeypatch.setattr(module._Rows, "__getitem__", lambda self, place: looked.append(place) or take(self, place))
    draw = torch.Generator().manual_seed(1)
    greedy_coverage(torch.randn(1, 150, 40, generator=draw), torch.rand(1, 150, generator=draw), 40)
    assert 40 <= len(looked) < 40 * 150 / 4
    looked.clear()
    # where all products are 0 as well
    greedy_coverage(torch.randn(1, 150, 40, generator=draw), torch.zeros(1, 150), 40)
    assert 40 <= len(looked) < 40 * 150 / 2


def test_gains_in_parts_are_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    table, covered = cosines(torch.randn(2, 40, 8)), torch.rand(2, 40)
    monkeypatch.setattr(module, "_CELLS", 7 * 2 * 40)
    torch.testing.assert_close(gains(table, covered), (table - covered[..., None]).clamp_min(0).sum(1))


def test_one_of_each_cluster_scaled_weights_and_half_precision() -> None:
    draw = torch.Generator().manual_seed(1)
    centres = torch.eye(6)[None]
    features = (centres[:, :, None] + 0.01 * torch.randn(1, 6, 5, 6, generator=draw)).flatten(1, 2)
    assert sorted((greedy_coverage(features, torch.ones(1, 30), 6)[0] // 5).tolist()) == list(range(6))
    weights = torch.rand(1, 30, generator=draw)
    assert torch.equal(greedy_coverage(features, weights, 12), greedy_coverage(features, 4 * weights, 12))
    for dtype in (torch.float16, torch.bfloat16):
        half = features.to(dtype)
        assert torch.equal(greedy_coverage(half, weights, 12), greedy_coverage(half.float(), weights, 12))


def test_alike_tokens_come_by_weight() -> None:
    weights = torch.tensor([[3.0, 9.0, 1.0, 9.0, 5.0, 0.0]]) / 16
    assert greedy_coverage(torch.ones(1, 6, 4), weights, 6)[0].tolist() == [1, 3, 4, 0, 2, 5]


def test_the_formula_counts_what_is_multiplied() -> None:
    with FlopCounterMode(display=False) as counter:
        greedy_coverage(torch.randn(3, 50, 12), torch.rand(3, 50), 7)
    assert counter.get_total_flops() == greedy_coverage_flops(3, 50, 12)


def test_arguments_out_of_range_are_refused() -> None:
    features, weights = torch.randn(2, 6, 4), torch.rand(2, 6)
    for k in (0, 7):
        with pytest.raises(ValueError, match="1 <= k <= N"):
            greedy_coverage(features, weights, k)
    with pytest.raises(ValueError, match="one a token"):
        greedy_coverage(features, weights[:, :5], 2)
    for value in (-0.5, torch.nan, torch.inf):
        wrong = weights.clone()
        wrong[1, 3] = value
        with pytest.raises(ValueError, match="Weights must be"):
            greedy_coverage(features, wrong, 2)
    features[1, 5, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        greedy_coverage(features, weights, 2)
