"""VMTC against loops written from its card, and the card's invariants. Decisions closer than rounding are left out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _tiny import tiny_llava
from _views import make_view

import tokenprune
from tokenprune.interfaces.signals import Signal
from tokenprune.methods.vmtc import VMTC, clusters_of, kept_and_clusters


class Close(Exception):
    """Two candidates closer than rounding."""


def first_largest(values: dict[int, float]) -> int:
    order = sorted(values, key=lambda i: (-values[i], i))
    if len(order) > 1 and 0 < values[order[0]] - values[order[1]] < 1e-5:
        raise Close
    return order[0]


def unit(row: list[float]) -> list[float]:
    length = math.sqrt(sum(v * v for v in row))
    return [v / length for v in row] if length > 1e-12 else [0.0] * len(row)


def dot(a: list[float], b: list[float]) -> float:
    return sum(v * w for v, w in zip(a, b))


def k_means(u: list[list[float]], a: list[float], c: int) -> list[int]:
    n = len(u)
    seeds = [first_largest(dict(enumerate(a)))]
    while len(seeds) < c:
        seeds.append(first_largest({i: -max(dot(u[i], u[s]) for s in seeds) for i in range(n) if i not in seeds}))
    centres = [u[s] for s in seeds]
    before: list[int] = []
    of = [0] * n
    for _ in range(10):
        of = [first_largest({g: dot(u[i], centres[g]) for g in range(c)}) for i in range(n)]
        fit = [dot(u[i], centres[of[i]]) for i in range(n)]
        best = {first_largest({i: fit[i] for i in range(n) if of[i] == g}) for g in range(c) if g in of}
        empty = [g for g in range(c) if g not in of]
        free = {i: -fit[i] for i in range(n) if i not in best}
        for g in empty:
            worst = first_largest(free)
            del free[worst]
            of[worst] = g
        if of == before:
            break  # the same members have the same centres
        before = of
        centres = [unit([sum(u[i][d] for i in range(n) if of[i] == g) for d in range(len(u[0]))]) for g in range(c)]
    return of


def by_hand(x: list[list[float]], a: list[float], budget: int, append: bool) -> Any:
    """Places, rows and sizes of one image."""
    n = len(x)
    kept_count = max(min(math.floor(0.75 * budget + 0.5), budget - 1), 1)
    c = budget - kept_count
    kept = sorted(sorted(range(n), key=lambda i: (-a[i], i))[:kept_count])
    rest = [i for i in range(n) if i not in kept]
    of = k_means([unit(x[i]) for i in rest], [a[i] for i in rest], c) if c else []
    merged = []
    for g in range(c):
        members = [rest[i] for i in range(len(rest)) if of[i] == g]
        mass = sum(a[i] for i in members)
        weights = [a[i] / mass if mass >= 1e-8 else 1 / len(members) for i in members]
        row = [sum(w * x[i][d] for w, i in zip(weights, members)) for d in range(len(x[0]))]
        slot = sorted(members, key=lambda i: (-a[i], i))[0]
        merged.append((slot, row, float(len(members))))
    own = [(i, x[i], 1.0) for i in kept]
    rows = own + sorted(merged) if append else sorted(own + merged)
    return sorted(place for place, _, _ in rows), [row for _, row, _ in rows], [size for _, _, size in rows]


def problem(seed: int, ties: bool) -> tuple[VMTC, Any, Signal]:
    generator = torch.Generator().manual_seed(seed)
    grid = (1 + seed % 4, 2 + seed % 6)
    count = grid[0] * grid[1]
    k = [1, count - 1, 1 + seed * 7 % (count - 1)][seed % 3] if count > 2 else 1
    method, images = VMTC(placement="append" if seed % 4 == 3 else "slot"), 1 + seed % 3
    features = torch.randn(images, count, 3 + seed % 5, generator=generator)
    scores = torch.rand(images, count, generator=generator) / count
    if ties:
        features = torch.eye(features.shape[2])[torch.randint(features.shape[2], (images, count), generator=generator)]
        scores = torch.randint(4, (images, count), generator=generator) / 8
        features[torch.rand(images, count, generator=generator) < 0.05] = 0
    view = make_view(method, grid, k, features=features)
    (signal,) = view.signals
    view = make_view(method, grid, k, features=features, signals={signal: scores})
    return method, view, signal


@pytest.mark.parametrize("ties", [False, True], ids=["random", "ties"])
def test_equals_the_definition(ties: bool) -> None:
    compared = 0
    for seed in range(700):
        method, view, signal = problem(seed, ties)
        selection: Any = method.select(view)
        assert selection.indices.shape[1] == view.budget
        for image in range(view.num_images):
            try:
                places, rows, sizes = by_hand(
                    view.features[image].double().tolist(), view.signals[signal][image].double().tolist(), view.budget,
                    method.placement == "append",
                )  # fmt: skip
            except Close:
                continue
            compared += 1
            assert selection.indices[image].tolist() == places, seed
            assert selection.sizes[image].tolist() == sizes, seed
            if selection.features is not None:
                torch.testing.assert_close(selection.features[image], torch.tensor(rows), rtol=1e-5, atol=1e-6)
    assert compared > 800


def test_the_budget_is_shared_three_to_one() -> None:
    assert [kept_and_clusters(b) for b in (288, 192, 128, 64)] == [(216, 72), (144, 48), (96, 32), (48, 16)]
    assert [kept_and_clusters(b) for b in (1, 2, 3, 4, 5, 6)] == [(1, 0), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1)]


def test_kept_rows_are_bit_exact_and_sizes_count_all_tokens() -> None:
    for seed in range(20):
        method = VMTC()
        view = make_view(method, (6, 7), 2 + seed, images=3, seed=seed, features=torch.randn(3, 42, 8))
        selection: Any = method.select(view)
        kept, clusters = kept_and_clusters(view.budget)
        for image in range(3):
            own = selection.sizes[image] == 1
            rows = view.features[image, selection.indices[image]]
            same = (selection.features[image] == rows).all(1)
            assert int(same.sum()) >= kept and bool(own[same].all()) or clusters == 0
            assert float(selection.sizes[image].sum()) == 42


def test_every_cluster_has_a_member() -> None:
    """Tokens that are all alike leave every cluster but one empty, until they are filled."""
    unit_rows = torch.ones(2, 9, 3) / 3**0.5
    for count in range(1, 10):
        cluster = clusters_of(unit_rows, torch.rand(2, 9), count)
        assert all(set(row.tolist()) == set(range(count)) for row in cluster)


def test_redundant_tokens_that_are_alike_merge_to_that_token() -> None:
    features = torch.randn(1, 1, 8).expand(1, 20, 8).contiguous()
    selection: Any = VMTC().select(make_view(VMTC(), (4, 5), 8, images=1, features=features))
    torch.testing.assert_close(selection.features, features[:, :8])


def test_merged_tokens_lie_between_their_members() -> None:
    view = make_view(VMTC(), (6, 6), 12, images=2, features=torch.rand(2, 36, 4))
    merged: Any = VMTC().select(view).features
    low, high = view.features.amin(1, keepdim=True), view.features.amax(1, keepdim=True)
    assert bool((merged >= low - 1e-6).all() and (merged <= high + 1e-6).all())


def test_appended_tokens_need_positions_that_close_up() -> None:
    with pytest.raises(ValueError, match="placement must be one of slot, append, got 'end'"):
        VMTC(placement="end")
    with pytest.raises(ValueError, match="positions is 'keep'"):
        VMTC(placement="append", positions="keep")
    with pytest.raises(ValueError, match="positions is 'keep'"):
        tokenprune.apply(tiny_llava(), "vmtc", keep=9, placement="append", positions="keep")
