"""Lazy greedy coverage against plain greedy; `tests/methods/test_scope.py` compares it with its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokenprune.kernels import greedy_coverage as module
from tokenprune.kernels.greedy_coverage import _plain, cosines, gains, greedy_coverage


def exact_states(count: int, draw: torch.Generator) -> torch.Tensor:
    """Rows of length 4 whose cosines are whole sixteenths: sums are exact in fp32, and ties are many."""
    return 2.0 * torch.randint(0, 2, (2, count, 16), generator=draw) - 1


def test_all_images_at_once_choose_as_one_by_one_and_choices_are_nested() -> None:
    for seed in range(60):
        draw = torch.Generator().manual_seed(seed)
        table = cosines(exact_states(21, draw))
        weights = torch.randint(0, 5, (2, 21), generator=draw) / 4
        for add in (False, True):
            whole = greedy_coverage(table, weights, 20, add)
            assert torch.equal(_plain(table, weights, 20, add), whole)
            for k in (1, 7, 13):
                assert torch.equal(greedy_coverage(table, weights, k, add), whole[:, :k])


def test_gains_in_parts_are_gains() -> None:
    table, covered = cosines(torch.randn(2, 40, 8)), torch.rand(2, 40)
    truth = (table - covered[..., None]).clamp_min(0).sum(1)
    before = module._CELLS
    try:
        module._CELLS = 7 * 2 * 40
        torch.testing.assert_close(gains(table, covered), truth)
    finally:
        module._CELLS = before


def test_one_of_each_cluster_and_scaled_attention() -> None:
    draw = torch.Generator().manual_seed(1)
    centres = torch.eye(6)[None]
    features = (centres[:, :, None] + 0.01 * torch.randn(1, 6, 5, 6, generator=draw)).flatten(1, 2)
    order = greedy_coverage(cosines(features), torch.ones(1, 30), 6)
    assert sorted((order[0] // 5).tolist()) == list(range(6))
    weights = torch.rand(1, 30, generator=draw)
    assert torch.equal(
        greedy_coverage(cosines(features), weights, 12), greedy_coverage(cosines(features), 4 * weights, 12)
    )


def test_alike_tokens_come_by_saliency() -> None:
    attention = torch.tensor([[3.0, 9.0, 1.0, 9.0, 5.0, 0.0]]) / 16
    assert greedy_coverage(torch.ones(1, 6, 6), attention, 5)[0].tolist() == [1, 3, 4, 0, 2]


def test_tokens_without_weight_come_by_what_they_add_and_then_by_index() -> None:
    """Three groups of copies; only the second group has weight, so the others come by size, then all that is left."""
    group = torch.tensor([0, 1, 2, 2, 1, 2])
    table = cosines(torch.eye(3)[group][None])
    weights = (group == 1).float()[None]
    for choose in (greedy_coverage, _plain):
        assert choose(table, weights, 6, False)[0].tolist() == [1, 2, 0, 4, 3, 5]


def test_few_tokens_are_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What laziness is for: of 300 tokens in 40 steps plain greedy adds up 40 x 300 columns."""
    draw = torch.Generator().manual_seed(3)
    centres = torch.randn(30, 24, generator=draw).repeat_interleave(10, 0)
    table = cosines((centres + 0.7 * torch.randn(300, 24, generator=draw))[None])
    looked: list[int] = []
    maximum = np.maximum

    def noted(one, other, *args, **kwargs):
        looked.append(np.ndim(one))
        return maximum(one, other, *args, **kwargs)

    weights = torch.rand(1, 300, generator=draw)
    expected = _plain(table, weights, 40, False)
    monkeypatch.setattr(module.np, "maximum", noted)
    assert torch.equal(greedy_coverage(table, weights, 40), expected)
    # one table at first, and one call a step for what is covered
    assert looked.count(2) == 1 and looked.count(1) - 40 < 0.1 * 40 * 300


def test_arguments_out_of_range_are_refused() -> None:
    table, weights = cosines(torch.randn(2, 6, 4)), torch.rand(2, 6)
    for k in (0, 7):
        with pytest.raises(ValueError, match="k must be from 1 to N = 6"):
            greedy_coverage(table, weights, k)
    for wrong in (table[:, :5], table.double(), table[0]):
        with pytest.raises(ValueError, match=r"needs cosines \[M, N, N\] in fp32"):
            greedy_coverage(wrong, weights, 2)
    with pytest.raises(ValueError, match=r"weights must be \[M, N\] = \(2, 6\)"):
        greedy_coverage(table, weights[0], 2)
