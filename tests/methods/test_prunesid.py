"""PruneSID against its card, step by step in NumPy."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from _views import TOWER, make_view

from tokenprune.interfaces.signals import CLS_ATTENTION, TOWER_STATES, Signal
from tokenprune.methods.prunesid import PruneSid, principal_groups, shares, survivors

NO_CLS = dataclasses.replace(TOWER, has_cls=False)


def by_hand(states: np.ndarray, attention: np.ndarray | None, k: int) -> tuple[list[int], list[list[int]], float]:
    """One image as the card tells it: what stays, the groups, and by how much the closest decision was won."""
    n = len(states)
    q = min(n, max(1, k // 4) if attention is not None else min(k, max(4, k // 4)))
    table = 1 / (1 + np.exp(-states.T))  # channels by tokens
    table = table - table.mean(axis=0)
    _, singular, right = np.linalg.svd(table, full_matrices=False)
    right = np.abs(right[:q].T) * (singular[:q] > 1e-6 * singular[0])  # [n, q]
    q = right.shape[1]
    ordered = np.sort(right, axis=1)
    gap = float((ordered[:, -1] - ordered[:, -2]).min()) if q > 1 else 1.0
    group = right.argmax(axis=1)
    score = right.max(axis=1) if attention is None else attention
    unit = states / np.linalg.norm(states, axis=1, keepdims=True)
    cosine = unit @ unit.T
    if attention is None:
        theta = max(18 * k / n, 1) * sum(cosine[i, j] for i in range(n) for j in range(i, n)) / n**2
    else:
        theta = k / 32 * np.mean([cosine[i, j] for i in range(n) for j in range(i + 1, n)])
    gap = min(gap, min((abs(cosine[i, j] - theta) for i in range(n) for j in range(i)), default=1.0))
    given: dict[int, list[int]] = {}
    unique: dict[int, int] = {}
    members: list[list[int]] = []
    for g in range(q):
        mine = sorted((i for i in range(n) if group[i] == g), key=lambda i: (-score[i], i))
        members.append(mine)
        alive: list[int] = []
        for i in mine:
            if all(cosine[i, j] <= theta for j in alive):
                alive.append(i)
        unique[g] = len(alive)
        given[g] = [*alive, *(i for i in mine if i not in alive)]
    low = [min(1, len(mine)) for mine in members]
    up = [min(5 * math.ceil(k / 64), len(mine), unique[g]) for g, mine in enumerate(members)]
    while sum(up) < k:
        up = [min(u + 1, len(mine)) for u, mine in zip(up, members)]
    rest, total, running, before = max(0, k - sum(low)), sum(unique.values()), 0, 0
    counts = []
    for g in range(q):
        running += unique[g]
        at = round(running / total * rest)
        counts.append(min(at - before + low[g], up[g]))
        before = at
    left = k - sum(counts)
    for g in sorted(range(q), key=lambda g: (-unique[g], g)):
        more = min(left, up[g] - counts[g])
        counts[g] += more
        left -= more
    return sorted(i for g in range(q) for i in given[g][: counts[g]]), members, gap


def test_equals_the_card_index_for_index() -> None:
    compared = 0
    for seed in range(240):
        draw = torch.Generator().manual_seed(seed)
        grid = (2 + seed % 7, 3 + seed % 6)
        n = grid[0] * grid[1]
        k = 1 + (seed * 7) % (n - 1)
        width = (8, 40)[seed % 2]  # fewer channels than tokens, and more
        states = torch.randn(2, n, width, generator=draw)
        if seed % 3 == 0:  # near copies
            states[:, n // 2 :] = states[:, : n - n // 2] + 0.05 * torch.randn(2, n - n // 2, width, generator=draw)
        if seed % 4:
            attention = (torch.randint(0, 9, (2, n), generator=draw) / 64).float()  # many ties
            signals = {Signal(CLS_ATTENTION, 4): attention, Signal(TOWER_STATES, 4): states}
            view = make_view(PruneSid(), grid, k, images=2, signals=signals)
        else:
            attention = None
            view = make_view(PruneSid(), grid, k, images=2, features=states, tower=NO_CLS)
        kept = PruneSid().select(view).indices
        for image in range(2):
            one: Any = None if attention is None else attention[image].double().numpy()
            truth, _, gap = by_hand(states[image].double().numpy(), one, k)
            if gap > 1e-7:
                compared += 1
                assert kept[image].tolist() == truth, seed
    assert compared > 350


def test_groups_partition_tokens_and_signs_do_not_matter() -> None:
    states = torch.randn(1, 30, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loading, group = principal_groups(states, 5)
    assert group.shape == (1, 30) and int(group.max()) < 5 and bool((loading >= 0).all())
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    _, moved = principal_groups(states[:, order], 5)
    assert torch.equal(moved, group[:, order])


def test_a_copy_is_suppressed_and_nothing_is_above_a_threshold_of_one() -> None:
    alike = torch.zeros(1, 4, 4, dtype=torch.bool)
    alike[0, 1, 3] = alike[0, 3, 1] = True
    one_group, order = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[3, 1, 0, 2]])
    assert survivors(alike, one_group, order)[0].tolist() == [True, False, True, True]
    apart = torch.tensor([[0, 0, 0, 1]])
    assert survivors(alike, apart, order).all(), "copies in different groups both stay"
    assert survivors(torch.zeros_like(alike), one_group, order).all()


def test_a_suppressed_token_suppresses_nobody() -> None:
    alike = torch.zeros(1, 3, 3, dtype=torch.bool)
    alike[0, 0, 1] = alike[0, 1, 0] = alike[0, 1, 2] = alike[0, 2, 1] = True
    found = survivors(alike, torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[0, 1, 2]]))
    assert found[0].tolist() == [True, False, True]


def test_shares_are_within_bounds_and_add_up() -> None:
    draw = torch.Generator().manual_seed(3)
    for budget in (12, 17, 64, 65, 130):
        sizes = torch.randint(0, 40, (20, 12), generator=draw)
        sizes[:, 0] += budget  # there are enough tokens
        unique = (sizes * torch.rand(20, 12, generator=draw)).long().maximum(sizes.clamp_max(1))
        given = shares(sizes, unique, budget)
        assert bool((given.sum(1) == budget).all()) and bool((given <= sizes).all()) and bool((given >= 0).all())
