"""PruMerge and PruMerge+ against their card, and the wide attention against the tower's own projections."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from _tiny import prompts, tiny_llava
from _views import make_view
from masked_reference import relative_error

import tokenprune
from tokenprune.capture.vision import vision_signal
from tokenprune.interfaces.signals import CLS_WIDE_ATTENTION, TOWER_KEYS, Signal
from tokenprune.methods.prumerge import PruMerge
from tokenprune.methods.prumerge_plus import PruMergePlus, with_spread

LAST = 5


def merged_by_hand(features, keys, attention, kept, neighbours):
    """x_i plus the sum of a_j x_j over the others with the most similar keys."""
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    rows = []
    for i in kept:
        others = sorted((j for j in range(len(keys)) if j != i), key=lambda j: (-round(float(unit[i] @ unit[j]), 9), j))
        rows.append(features[i] + sum((attention[j] * features[j] for j in others[:neighbours]), 0 * features[i]))
    return np.array(rows)


def spread_by_hand(first, n, k):
    others = [i for i in range(n) if i not in first]
    wanted = k - len(first)
    return sorted([*first, *(others[(2 * j + 1) * len(others) // (2 * wanted)] for j in range(wanted))])


def case(seed: int):
    draw = torch.Generator().manual_seed(seed)
    grid = (2 + seed % 6, 3 + seed % 7)
    n = grid[0] * grid[1]
    attention = torch.randint(1, 7 if seed % 2 else 4000, (2, n), generator=draw) / 4096
    attention[:, : 1 + seed % 8] *= 1 + seed % 90  # some stand out
    keys = 2.0 * torch.randint(0, 2, (2, n, 16), generator=draw) - 1  # of length 4: many equal cosines
    features = torch.randn(2, n, 6, generator=draw)
    signals = {Signal(CLS_WIDE_ATTENTION, LAST): attention, Signal(TOWER_KEYS, LAST): keys}
    return grid, n, attention, keys, features, signals


@pytest.mark.parametrize("name", ["budget", "outliers", "plus"])
def test_equals_the_card(name: str) -> None:
    adaptive = set()
    for seed in range(250):
        grid, n, attention, keys, features, signals = case(seed)
        k = 1 + seed * 3 % (n - 1)
        neighbours = (32, 3, 0)[seed % 3]
        method = PruMergePlus(neighbours=neighbours) if name == "plus" else PruMerge(count=name, neighbours=neighbours)
        selection = method.select(make_view(method, grid, k, images=2, features=features, signals=signals))
        for image in range(2):
            a = attention[image].double().numpy()
            ranked = sorted(range(n), key=lambda i: (-a[i], i))
            if name == "plus":
                truth = spread_by_hand(sorted(ranked[: max(1, k // 4)]), n, k)
            elif name == "outliers":
                first, third = np.percentile(attention[image].numpy(), [25, 75])
                count = int((attention[image].numpy() > np.float32(third + 1.5 * (third - first))).sum())
                truth = sorted(ranked[: min(max(count, 1), k)])
                adaptive.add(len(truth))
            else:
                truth = sorted(ranked[:k])
            count = len(truth) if selection.counts is None else selection.counts[image]
            kept = selection.indices[image, :count].tolist()
            assert kept == truth, seed
            by_hand = merged_by_hand(
                features[image].double().numpy(), keys[image].double().numpy(), a, kept, neighbours
            )
            assert selection.features is not None
            assert relative_error(selection.features[image, :count], torch.tensor(by_hand)) < 1e-5
    if name == "outliers":
        assert len(adaptive) > 3, "the pictures decide"


def test_spread_keeps_distinct_places_for_every_budget() -> None:
    first = torch.tensor([[3, 7]])
    for k in range(2, 20):
        found = with_spread(first, 20, k)[0].tolist()
        assert found == spread_by_hand([3, 7], 20, k) if k > 2 else found == [3, 7]
        assert len(set(found)) == k


def test_wide_attention_takes_all_heads_as_one() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 11, 8, generator=draw) for _ in range(3))
    found, _ = vision_signal(Signal(CLS_WIDE_ATTENTION, 0), query, key, value, 1)
    for picture in range(2):
        wide_q = query[picture, :, 0].reshape(-1).double()
        wide_k = key[picture].transpose(0, 1).reshape(11, -1).double()
        truth = (wide_k @ wide_q / math.sqrt(32)).softmax(0)[1:]
        assert relative_error(found[picture], truth) < 1e-6


def test_outliers_decide_also_where_the_budget_would_keep_all() -> None:
    model, batch = tiny_llava(), prompts([1])
    with tokenprune.applied(model, "prumerge", keep=1.0, count="outliers") as handle, torch.no_grad():
        model(**batch)
    assert len(handle.kept[0][0]) < 36
    with tokenprune.applied(model, "prumerge", keep=1.0) as handle, torch.no_grad():
        model(**batch)
    assert len(handle.kept[0][0]) == 36


def test_unknown_counts_are_refused_with_the_near_name() -> None:
    with pytest.raises(ValueError, match="outliers"):
        PruMerge(count="outlier")
    with pytest.raises(ValueError, match="neighbours"):
        PruMergePlus(neighbours=-1)
