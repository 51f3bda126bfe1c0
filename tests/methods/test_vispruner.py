"""VisPruner against its card: the rounds of thinning out in plain Python."""

from __future__ import annotations

import pytest
import torch
from _views import TOWER, make_view

from tokenprune.interfaces.signals import CLS_ATTENTION, TOWER_STATES, Signal
from tokenprune.methods.vispruner import VisPruner


def by_hand(attention: list[float], states: torch.Tensor, k: int, share: float) -> list[int]:
    unit = (states.double() / states.double().norm(dim=1, keepdim=True)).tolist()

    def cosine(i: int, j: int) -> float:
        return round(sum(x * y for x, y in zip(unit[i], unit[j])), 9)

    order = sorted(range(len(attention)), key=lambda i: (-attention[i], i))
    important = int(k * share)
    rest, wanted = order[important:], k - important
    while len(rest) > wanted:
        even, odd = rest[::2], rest[1::2]
        leaving = min(8, len(rest) - wanted, len(even))
        alike = {i: max((cosine(i, j) for j in odd), default=0.0) for i in even}
        ranked = sorted(range(len(even)), key=lambda place: (-alike[even[place]], place))
        rest = [even[place] for place in ranked[leaving:]] + odd
        if wanted == 0:
            rest = []
    return sorted(order[:important] + rest)


@pytest.mark.parametrize("ties", [False, True])
def test_equals_the_card_index_for_index(ties: bool) -> None:
    for seed in range(300):
        draw = torch.Generator().manual_seed(seed)
        grid = (1 + seed % 6, 2 + seed % 9)
        n = grid[0] * grid[1]
        k, share = 1 + seed * 5 % (n - 1) if n > 2 else 1, (0.5, 0.75, 0.0, 1.0)[seed % 4]
        attention = torch.randint(0, 6 if ties else 10**6, (2, n), generator=draw) / 2.0**20
        if ties:  # all of length 4: cosines are whole sixteenths, and many are the same
            states = 2.0 * torch.randint(0, 2, (2, n, 16), generator=draw) - 1
        else:
            states = torch.randn(2, n, 24, generator=draw)
        method = VisPruner(important=share)
        signals = {Signal(CLS_ATTENTION, 4): attention, Signal(TOWER_STATES, 4): states}
        kept = method.select(make_view(method, grid, k, images=2, signals=signals)).indices
        for image in range(2):
            assert kept[image].tolist() == by_hand(attention[image].tolist(), states[image], k, share), seed


def test_the_share_is_checked() -> None:
    for wrong in (-0.1, 1.5, True):
        with pytest.raises(ValueError, match="important"):
            VisPruner(important=wrong)


def test_only_attention_is_the_ranking_of_attention() -> None:
    method = VisPruner(important=1.0)
    view = make_view(method, (6, 6), 10)
    attention = view.signal(CLS_ATTENTION, TOWER.feature_layer)
    assert torch.equal(method.select(view).indices, attention.topk(10).indices.sort().values)


@pytest.mark.parametrize("k", [64, 128, 192])
def test_on_576_patches_the_official_gather_loses_nothing(k: int) -> None:
    """The code gathers R // 2 - r' rows of a, one short where R is odd: here every round is even, so it is the same."""
    draw = torch.Generator().manual_seed(k)
    states = 2.0 * torch.randint(0, 2, (576, 16), generator=draw) - 1
    attention = torch.randperm(576, generator=draw) / 1024
    cosine = (states @ states.T / 16).tolist()
    order = sorted(range(576), key=lambda i: -attention[i])
    rest, wanted = order[k // 2 :], k - k // 2
    while len(rest) > wanted:
        assert len(rest) % 2 == 0
        leaving, half = min(8, len(rest) - wanted), len(rest) // 2
        even, odd = rest[::2], rest[1::2]
        alike = [max(cosine[i][j] for j in odd) for i in even]
        ranked = sorted(range(half), key=lambda place: (-alike[place], place))
        rest = [even[place] for place in ranked[leaving:][: half - leaving]] + odd
    signals = {Signal(CLS_ATTENTION, 4): attention[None], Signal(TOWER_STATES, 4): states[None]}
    kept = VisPruner().select(make_view(VisPruner(), (24, 24), k, images=1, signals=signals)).indices
    assert kept[0].tolist() == sorted(order[: k // 2] + rest)
