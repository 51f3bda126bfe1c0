"""HoliTom against its card, in plain Python with windows by brute force; decisions closer than rounding are left
out."""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from _views import TOWER, make_view
from torch import Tensor

from tokenprune.interfaces.signals import SINK_ATTENTION, Signal
from tokenprune.interfaces.view import View
from tokenprune.interfaces.visual import Raster
from tokenprune.methods.holitom import HoliTom, static_places

ATTENTION = Signal(SINK_ATTENTION, TOWER.feature_layer, (0.0,))
Place = tuple[int, int]


class Close(Exception):
    """Two candidates closer than rounding."""


def frames_of(count: int, grid: tuple[int, int], kind: str = "frame") -> tuple[Raster, ...]:
    return tuple(Raster(grid, t * grid[0] * grid[1], kind) for t in range(count))


def view_of(
    method: HoliTom, features: Tensor, attention: Tensor, rasters: tuple[Raster, ...], k: int, **fields: Any
) -> View:
    return make_view(
        method,
        (features.shape[1], 1),
        k,
        images=len(features),
        features=features,
        signals={ATTENTION: attention},
        rasters=rasters,
        **fields,
    )


# --- the card, slowly


def ordered(values: dict[Any, float], same: dict[Any, Any] | None = None) -> list[Any]:
    """Keys by falling value, the earlier of equals first; Close where two are near and not the same."""
    order = sorted(values, key=lambda key: (-values[key], key))
    for a, b in itertools.pairwise(order):
        alike = values[a] == values[b] if same is None else same[a] == same[b]
        if not alike and values[a] - values[b] <= 1e-5 * max(abs(values[a]), abs(values[b])):
            raise Close
    return order


def cosine(a: list[float], b: list[float]) -> float:
    lengths = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
    return sum(x * y for x, y in zip(a, b)) / lengths if lengths else 0.0


def best_windows(spared: dict[tuple[int, int], int], frames: int) -> list[tuple[int, int]]:
    """Of all ways to cut, the one that spares most; of equals the one with the latest begins, from the last on."""
    found = []
    for cuts in itertools.product((False, True), repeat=frames - 1):
        starts = [0, *(t + 1 for t, cut in enumerate(cuts) if cut)]
        ends = [*(s - 1 for s in starts[1:]), frames - 1]
        gain = sum(spared[pair] for pair in zip(starts, ends))
        found.append((gain, starts[::-1], list(zip(starts, ends))))
    return max(found)[2]


def gains(change: dict[Place, float], tau: float, frames: int, places: int) -> dict[tuple[int, int], int]:
    """What each window spares; `change` is the cosine with the frame before."""
    return {
        (s, e): (e - s)
        * sum(all(change.get((t, p), -2) > tau for t in range(s + 1, e + 1)) for p in range(places))
        for s in range(frames)
        for e in range(s, frames)
    }  # fmt: skip


def cluster(x: dict[Place, list[float]], count: int, neighbours: int) -> dict[Place, list[Place]]:
    """Members of each centre, itself not among them."""
    if not count:
        return {}
    root = math.sqrt(len(next(iter(x.values()))))
    dist = {(a, b): math.dist(x[a], x[b]) / root for a in x for b in x}
    use = min(neighbours, count)
    near = {a: tuple(round(d, 6) for d in sorted(dist[a, b] for b in x)[:use]) for a in x}
    density = {a: math.exp(-sum(d * d for d in sorted(dist[a, b] for b in x)[:use]) / use) for a in x}
    by_density = ordered(density, near)
    for a, b in itertools.combinations(x, 2):
        if near[a] == near[b]:  # the same but for rounding
            density[b] = density[a]
    reach = {}
    for place, a in enumerate(sorted(by_density, key=lambda a: (-density[a], a))):
        denser = [b for b in x if (density[b], [-v for v in b]) > (density[a], [-v for v in a])]
        assert len(denser) == place
        reach[a] = min(dist[a, b] for b in denser) if denser else max(dist.values())
    score = {a: density[a] * reach[a] for a in x}
    same = {a: 0.0 if reach[a] == 0 else (near[a], round(reach[a], 6)) for a in x}
    # ties as the card's choice has them: equal products, the earlier first
    rank = {a: next(score[b] for b in sorted(x) if same[b] == same[a]) for a in x}
    centres = sorted(ordered(rank, same)[:count])
    members: dict[Place, list[Place]] = {c: [] for c in centres}
    for a in x:
        if a not in members:
            to = {c: -dist[a, c] for c in centres}
            members[ordered(to, {c: round(v, 6) for c, v in to.items()})[0]].append(a)
    return members


def webster(sizes: dict[Any, int], k: int) -> dict[Any, int]:
    there = [g for g in sorted(sizes) if sizes[g]]
    counts = {g: int(k >= len(there) and sizes[g] > 0) for g in sizes}
    while sum(counts.values()) < min(k, sum(sizes.values())):
        open_to = [g for g in there if counts[g] < sizes[g]]
        counts[min(open_to, key=lambda g: (Fraction(2 * counts[g] + 1, 2 * sizes[g]), g))] += 1
    return counts


def by_hand(
    method: HoliTom, x: dict[Place, list[float]], attention: dict[Place, float], rasters: tuple[Raster, ...], k: int
) -> dict[Place, tuple[list[float], float]]:
    """Kept places with their rows and sizes; `x` are the tokens that are there, by (raster, place)."""
    frames, places = len(rasters), max(raster.num_tokens for raster in rasters)
    change = {}
    for t, p in x:
        follows = t > 0 and rasters[t].kind == rasters[t - 1].kind == "frame" and rasters[t].grid == rasters[t - 1].grid
        if follows and (t - 1, p) in x:
            c = cosine(x[t, p], x[t - 1, p])
            if c != method.tau and abs(c - method.tau) < 1e-6:
                raise Close
            change[t, p] = c
    found = best_windows(gains(change, method.tau, frames, places), frames)
    window = {t: (s, e) for s, e in found for t in range(s, e + 1)}
    static = set()
    for t, p in x:
        s, e = window[t]
        if e > s and all(change.get((u, p), -2) > method.tau for u in range(s + 1, e + 1)):
            static.add((t, p))
    later = {(t, p) for t, p in static if t > window[t][0]}
    missing = k - (len(x) - len(later))
    if method.total == "exact" and missing > 0:
        alone = ordered({a: -change[a] for a in later}, {a: round(change[a], 6) for a in later})[:missing]
        later -= set(alone)
        static -= set(alone)
    rows, sizes = {}, {}
    for t, p in x:
        if (t, p) in later:
            continue
        own = [(t, p), *((u, p) for u in range(t + 1, window[t][1] + 1) if (t, p) in static and (u, p) in later)]
        rows[t, p] = [sum(column) / len(own) for column in zip(*(x[a] for a in own))]
        sizes[t, p] = len(own)
    groups: dict[tuple[int, int], dict[Place, list[float]]] = {(t, kind): {} for t in range(frames) for kind in (0, 1)}
    for place in sorted(rows):
        groups[place[0], int(place not in static)][place] = rows[place]
    total = len(rows)
    if method.total == "exact":
        counts = webster({g: len(group) for g, group in groups.items()}, k)
    else:
        part = {g: Fraction(len(group) * k, total) for g, group in groups.items()}
        counts = {g: min(len(groups[g]), math.ceil(part[g]) if g[1] else round(part[g])) for g in groups}
        if not any(counts.values()):
            counts[next(g for g in sorted(groups) if groups[g])] = 1
    kept = {}
    for g, group in groups.items():
        loose, clusters = group, counts[g]
        if g[1]:
            first = round(counts[g] * (1 - method.contextual))
            chosen = sorted(group, key=lambda a: (-attention[a], a))[:first]
            kept |= {a: (rows[a], float(sizes[a])) for a in chosen}
            loose, clusters = {a: row for a, row in group.items() if a not in chosen}, counts[g] - first
        for centre, members in cluster(loose, clusters, method.neighbours).items():
            row = rows[centre]
            if members:
                sums = [sum(column) for column in zip(*(rows[a] for a in members))]
                if method.merge == "mean":
                    row = [(own + other) / (len(members) + 1) for own, other in zip(row, sums)]
                else:
                    row = [method.beta * a + (1 - method.beta) * b / len(members) for a, b in zip(row, sums)]
            kept[centre] = (row, float(sizes[centre] + sum(sizes[a] for a in members)))
    return kept


# --- cases


def drawn(kind: str, seed: int) -> tuple[Tensor, Tensor, int, tuple[int, int], float]:
    """Features `[2, F P, D]`, attention with ties, F, the grid and tau."""
    draw = torch.Generator().manual_seed(seed)
    frames, grid = 1 + seed % 6, (1 + seed % 3, 2 + seed // 3 % 3)
    tau = (0.8, 0.6, 0.95)[seed % 3]
    if kind == "edge":
        frames = 2
    shape = (2, frames, grid[0] * grid[1])
    if kind == "random":
        first = torch.randn(2, 1, shape[2], 10, generator=draw)
        drift = torch.randn(*shape, 10, generator=draw).cumsum(dim=1)
        x = first + drift * torch.rand(2, 1, shape[2], 1, generator=draw)
    elif kind == "line":  # distances are whole numbers, and every other turn of the sign is a change
        along = torch.randint(0, 5, (2, 1, shape[2]), generator=draw)
        sign = 1 - 2 * (torch.rand(*shape, generator=draw) < 0.25).long()
        x = torch.zeros(*shape, 16)
        x[..., 0] = 4.0 * along * sign
    else:  # rows of ones; equal ones are equal, and in "edge" cosines are tau itself
        x = 2.0 * torch.randint(0, 2, (*shape, 16), generator=draw) - 1
        stays = torch.rand(*shape, generator=draw) < 0.7
        for t in range(1, frames):
            same = x[:, t - 1].clone()
            if kind == "edge":
                same[..., : 2 + seed % 2 * 2] *= 1 - 2 * torch.randint(
                    0, 2, same[..., : 2 + seed % 2 * 2].shape, generator=draw
                )
            x[:, t] = torch.where(stays[:, t, :, None], same, x[:, t])
        tau = {"edge": (0.75, 0.5)[seed % 2], "copies": 0.9}[kind]
    attention = torch.randint(1, 9, (2, frames * shape[2]), generator=draw) / 64
    return x.flatten(1, 2), attention, frames, grid, tau


OPTIONS: list[dict[str, Any]] = [
    {},
    {"contextual": 0.5},
    {"contextual": 1.0, "merge": "mean"},
    {"contextual": 0.3, "neighbours": 2, "beta": 0.25},
    {"merge": "mean"},
]


def check(
    method: HoliTom,
    features: Tensor,
    attention: Tensor,
    rasters: tuple[Raster, ...],
    k: int,
    tokens: Tensor | None,
    seed: int,
) -> tuple[int, int]:
    """Compare with the card; how many images were, and how many of them had a merged token."""
    fields = {} if tokens is None else {"tokens": tokens}
    selection = method.select(view_of(method, features, attention, rasters, k, **fields))
    selection.validate(2, features.shape[1])
    assert selection.sizes is not None
    where = [(t, p) for t, raster in enumerate(rasters) for p in range(raster.num_tokens)]
    compared = merged = 0
    for image in range(2):
        here = [where[i] for i in (range(len(where)) if tokens is None else tokens[image].tolist())]
        x = dict(zip(here, features[image].double().tolist()))
        try:
            truth = by_hand(method, x, dict(zip(here, attention[image].tolist())), rasters, k)
        except Close:
            continue
        n = selection.indices.shape[1] if selection.counts is None else selection.counts[image]
        assert method.total == "official" or n == k
        assert [here[i] for i in selection.indices[image, :n].tolist()] == sorted(truth), seed
        assert selection.sizes[image, :n].tolist() == [truth[a][1] for a in sorted(truth)], seed
        rows = torch.tensor([truth[a][0] for a in sorted(truth)])
        if selection.features is None:
            assert torch.equal(rows.float(), features[image][selection.indices[image, :n]])
        else:
            torch.testing.assert_close(selection.features[image, :n], rows.float(), rtol=1e-5, atol=1e-6)
        compared, merged = compared + 1, merged + bool(max(size for _, size in truth.values()) > 1)
    return compared, merged


def compare_with_card(kind: str, total: str, seeds: range) -> None:
    compared = merged = 0
    for seed in seeds:
        features, attention, frames, grid, tau = drawn(kind, seed)
        count = features.shape[1]
        k = (1, count - 1)[seed % 2] if seed % 7 == 0 else 1 + seed * 5 % (count - 1)
        method = HoliTom(tau=tau, total=total, **OPTIONS[seed // 6 % len(OPTIONS)])
        found = check(method, features, attention, frames_of(frames, grid), k, None, seed)
        compared, merged = compared + found[0], merged + found[1]
    assert compared > 1.4 * len(seeds) and merged > len(seeds)


every_kind = pytest.mark.parametrize("kind", ["random", "copies", "edge", "line"])
every_total = pytest.mark.parametrize("total", ["exact", "official"])


@every_total
@every_kind
def test_equals_the_card(kind: str, total: str) -> None:
    compare_with_card(kind, total, range(60))


@pytest.mark.slow
@every_total
@every_kind
def test_equals_the_card_on_more(kind: str, total: str) -> None:
    compare_with_card(kind, total, range(60, 600))


@every_total
def test_behind_another_cut_places_that_are_empty_are_not_static(total: str) -> None:
    compared = merged = 0
    for seed in range(100):
        features, attention, frames, grid, tau = drawn(("random", "copies")[seed % 2], seed)
        count = features.shape[1]
        draw = torch.Generator().manual_seed(seed)
        left = max(2, count - 1 - seed % 4)
        tokens = torch.stack([torch.randperm(count, generator=draw)[:left].sort().values for _ in range(2)])
        features = features.gather(1, tokens[..., None].expand(-1, -1, features.shape[2]))
        method = HoliTom(tau=tau, total=total, **OPTIONS[seed // 6 % len(OPTIONS)])
        k = 1 + seed * 5 % (left - 1)
        found = check(method, features, attention.gather(1, tokens), frames_of(frames, grid), k, tokens, seed)
        compared, merged = compared + found[0], merged + found[1]
    assert compared > 140 and merged > 80


@every_total
def test_crops_of_several_sizes_are_frames_without_windows(total: str) -> None:
    for seed in range(60):
        sizes = [(2, 3), (2, 3), (1, 4), (3, 1), (3, 1)][: 2 + seed % 4]
        kinds = ["frame", "frame", "crop", "crop", "crop"]
        rasters, start = [], 0
        for grid, kind in zip(sizes, kinds):
            rasters.append(Raster(grid, start, kind))
            start += grid[0] * grid[1]
        draw = torch.Generator().manual_seed(seed)
        features = torch.randn(2, 1, 10, generator=draw) + torch.rand(2, start, 10, generator=draw)
        attention = torch.randint(1, 9, (2, start), generator=draw) / 64
        tokens = None
        if seed % 2:
            tokens = torch.stack([torch.randperm(start, generator=draw)[: start - 2].sort().values for _ in range(2)])
            features = features.gather(1, tokens[..., None].expand(-1, -1, 10))
            attention = attention.gather(1, tokens)
        method = HoliTom(tau=0.5, total=total, **OPTIONS[seed % len(OPTIONS)])
        check(method, features, attention, tuple(rasters), 1 + seed * 5 % (features.shape[1] - 1), tokens, seed)
        fields = {} if tokens is None else {"tokens": tokens}
        video = method.over_time(view_of(method, features, attention, tuple(rasters), 2, **fields))
        assert not video.static[:, 2:].any()


# --- what the card promises


def test_windows_are_the_best_of_all_up_to_eight_frames() -> None:
    several = 0
    for seed in range(150):
        draw = torch.Generator().manual_seed(seed)
        frames, places = 1 + seed % 8, 1 + seed % 5
        change = torch.randint(0, 3, (2, frames, places), generator=draw) / 2.0
        change[:, 0] = -torch.inf
        static, begin = static_places(change, 0.25)
        for image in range(2):
            values = {(t, p): float(change[image, t, p]) for t in range(frames) for p in range(places)}
            found = best_windows(gains(values, 0.25, frames, places), frames)
            assert begin[image].tolist() == [s for s, e in found for _ in range(s, e + 1)], seed
            spared = sum(gains(values, 0.25, frames, places)[pair] for pair in found)
            later = static[image] & (torch.arange(frames) > begin[image])[:, None]
            assert int(later.sum()) == spared
            several += 1 < len(found) < frames
    assert several > 60


def test_equal_frames_are_one_window_of_static_tokens() -> None:
    frame = torch.randn(2, 6, 12)
    features, attention = frame.repeat(1, 5, 1), torch.rand(2, 30)
    for total in ("exact", "official"):
        method = HoliTom(total=total)
        view = view_of(method, features, attention, frames_of(5, (2, 3)), 6)
        video = method.over_time(view)
        assert video.static[:, 0].all() and not video.left[:, 1:].any()
        found = method.select(view)
        assert found.indices.tolist() == [list(range(6))] * 2 and bool((found.sizes == 5).all())
        torch.testing.assert_close(found.features, frame, rtol=1e-5, atol=1e-6)
    whole = method.select(dataclasses.replace(view, budget=30))
    assert whole.counts == [6, 6], "the official rule keeps no copies, whatever the budget"
    found = HoliTom().select(dataclasses.replace(view, budget=10))
    assert found.indices.shape == (2, 10) and found.sizes is not None
    assert bool((found.sizes.sum(dim=1) == 30).all())


def test_a_video_of_windows_with_less_than_half_a_token_each_keeps_one() -> None:
    scenes = torch.tensor([1.0, -1.0])[:, None, None, None] * torch.rand(2, 1, 4, 8)
    features = scenes.expand(2, 2, 4, 8).reshape(1, 16, 8)  # two frames of one, two of its negative
    for total in ("exact", "official"):
        method = HoliTom(total=total)
        found = method.select(view_of(method, features, torch.rand(1, 16), frames_of(4, (2, 2)), 1))
        assert found.indices.shape == (1, 1) and int(found.indices) < 4
        assert found.sizes is not None and float(found.sizes) == 8


def test_frames_that_all_change_are_windows_of_one() -> None:
    draw = torch.Generator().manual_seed(0)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None]
    features = (sign * torch.rand(1, 6, 8, generator=draw)).reshape(1, 24, 8)
    attention = torch.rand(1, 24, generator=draw)
    found = HoliTom().select(view_of(HoliTom(), features, attention, frames_of(4, (2, 3)), 8))
    assert bool((found.sizes == 1).all()) and found.features is not None
    assert torch.equal(found.features[0], features[0, found.indices[0]])
    for t in range(4):
        best = attention[0, 6 * t : 6 * t + 6].topk(2).indices + 6 * t
        assert sorted(best.tolist()) == [i for i in found.indices[0].tolist() if i // 6 == t]


def test_official_totals_are_about_the_budget() -> None:
    for seed in range(80):
        features, attention, frames, grid, tau = drawn("random", seed)
        count = features.shape[1]
        k = 1 + seed * 5 % (count - 1)
        method = HoliTom(tau=tau, total="official")
        view = view_of(method, features, attention, frames_of(frames, grid), k)
        left = method.over_time(view).left.sum(dim=(1, 2)).tolist()
        found = method.select(view)
        for n, there in zip(found.counts or [k] * 2, left):
            # a ceil for each frame, half a token for each window
            assert n == there if there <= k else k - frames / 2 <= n < k + 1.5 * frames


def test_of_a_picture_those_with_most_attention_stay_and_nothing_is_merged() -> None:
    view = make_view(HoliTom(), (4, 5), 6)
    found = HoliTom().select(view)
    best = view.signals[ATTENTION].topk(6, dim=1).indices.sort(dim=1).values
    assert torch.equal(found.indices, best) and found.features is None
    every = HoliTom(contextual=1.0).select(view)
    assert every.sizes is not None and every.sizes.sum(dim=1).tolist() == [20.0] * 3


def test_of_a_video_nothing_is_read_back() -> None:
    """Tensors of the meta device hold no values, so reading one raises."""
    for options in OPTIONS:
        features, attention = torch.empty(2, 30, 8, device="meta"), torch.empty(2, 30, device="meta")
        found = HoliTom(**options).select(view_of(HoliTom(), features, attention, frames_of(5, (2, 3)), 11))
        assert found.indices.shape == (2, 11) and found.features is not None


def test_options_are_refused_with_a_sentence() -> None:
    wrong: list[tuple[str, Any]] = [
        ("tau", 1.5), ("beta", -0.1), ("contextual", 2), ("neighbours", 0), ("merge", "means"), ("total", "exakt"),
        ("inner", 1.0), ("depth", 0.0),
    ]  # fmt: skip
    for name, value in wrong:
        with pytest.raises(ValueError, match=f"^{name} must be .*got {value!r}"):
            HoliTom(**{name: value})
