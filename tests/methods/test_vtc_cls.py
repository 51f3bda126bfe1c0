import dataclasses
from typing import Any

import pytest
import torch
from _views import TOWER, make_view, pick

from tokenprune.interfaces.signals import CLS_ATTENTION, SINK_ATTENTION, Signal, TowerInfo
from tokenprune.methods.vtc_cls import VtcCls

CLIP = TowerInfo(num_layers=24, feature_layer=22, has_cls=True, num_heads=16, hidden_size=1024)


def test_default_blocks_are_the_official_ones_on_clip() -> None:
    assert VtcCls().signals(CLIP) == tuple(Signal(CLS_ATTENTION, layer) for layer in range(16, 23))


def test_default_start_at_other_depths() -> None:
    for layers, feature_layer, start in ((12, 10, 8), (6, 4, 4), (4, 2, 2), (3, 2, 2), (2, 0, 0), (1, 0, 0)):
        tower = dataclasses.replace(CLIP, num_layers=layers, feature_layer=feature_layer)
        assert list(VtcCls().layers(tower)) == list(range(start, feature_layer + 1))


def test_blocks_behind_the_feature_layer_are_never_asked_for() -> None:
    for start in range(23):
        assert max(signal.layer for signal in VtcCls(start_layer=start).signals(CLIP)) == 22


@pytest.mark.parametrize("seed", range(20))
def test_equals_sum_and_rank_by_hand(seed: int) -> None:
    method = VtcCls(start_layer=seed % 5)
    grid = (2 + seed % 4, 3 + seed % 7)
    count = grid[0] * grid[1]
    view = make_view(method, grid, 1 + seed * 7 % (count - 1), images=2, seed=seed)
    kept = method.select(view).indices
    for image in range(2):
        score = [sum(float(view.signal(CLS_ATTENTION, b)[image, j]) for b in range(seed % 5, 5)) for j in range(count)]
        order = sorted(range(count), key=lambda j: (-score[j], j))
        assert kept[image].tolist() == sorted(order[: view.budget])


def test_mean_ensemble_and_single_block() -> None:
    method = VtcCls(start_layer=1)
    view = make_view(method, (8, 8), 20)
    rows = torch.stack([view.signal(CLS_ATTENTION, layer) for layer in range(1, 5)])
    mean = rows.mean(dim=0).topk(20, dim=1).indices.sort(dim=1).values
    assert torch.equal(method.select(view).indices, mean)
    last = VtcCls(start_layer=4).select(view).indices
    assert torch.equal(last, rows[3].topk(20, dim=1).indices.sort(dim=1).values)
    assert not torch.equal(last, mean)


def test_larger_budgets_keep_what_smaller_ones_kept() -> None:
    method = VtcCls()
    view = make_view(method)
    kept = [set(method.select(dataclasses.replace(view, budget=k)).indices[1].tolist()) for k in range(1, 30)]
    assert all(small < large for small, large in zip(kept, kept[1:]))


def test_ties_go_to_the_lower_index() -> None:
    method = VtcCls()
    view = make_view(method)
    flat = {signal: torch.full_like(rows, 0.25) for signal, rows in view.signals.items()}
    assert method.select(dataclasses.replace(view, signals=flat)).indices[0].tolist() == list(range(7))


def test_other_images_and_features_do_not_matter() -> None:
    method = VtcCls()
    view = make_view(method)
    alone = method.select(dataclasses.replace(pick(view, [1]), features=torch.randn(1, 30, 2)))
    assert torch.equal(alone.indices[0], method.select(view).indices[1])


def test_a_tower_without_cls_gets_the_labelled_stand_in() -> None:
    without = dataclasses.replace(TOWER, has_cls=False)
    received = [Signal(SINK_ATTENTION, layer, (0.0,)) for layer in range(TOWER.num_layers)]
    assert VtcCls().signals(without) == (received[TOWER.feature_layer],)
    assert VtcCls(start_layer=1).signals(without) == tuple(received[1 : TOWER.feature_layer + 1])
    assert "extension" in VtcCls().notes(without)[0] and not VtcCls().notes(TOWER)
    rows = torch.rand(3, 30)
    view = dataclasses.replace(make_view(VtcCls()), tower=without, signals={received[TOWER.feature_layer]: rows})
    assert torch.equal(VtcCls().select(view).indices, rows.topk(7, dim=1).indices.sort(dim=1).values)


def test_start_layers_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 22"):
        VtcCls(start_layer=23).signals(CLIP)
    wrong: Any
    for wrong in (-1, True):
        with pytest.raises(ValueError, match="start_layer must be None or"):
            VtcCls(start_layer=wrong)
