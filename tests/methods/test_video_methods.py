"""EVS and VidCom2 against their cards, in plain Python, and dealing a budget out to frames."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from _families import batch_of, family
from _views import make_view
from torch import Tensor

import tokenprune
from tokenprune.interfaces.visual import Raster
from tokenprune.methods._frames import deal
from tokenprune.methods.evs import Evs
from tokenprune.methods.vidcom2 import VidCom2


def video(frames: int, grid: tuple[int, int], kind: str = "frame") -> tuple[Raster, ...]:
    return tuple(Raster(grid, t * grid[0] * grid[1], kind) for t in range(frames))


def view_of(method, features: Tensor, frames: int, grid: tuple[int, int], budget: int):
    return make_view(
        method,
        (frames * grid[0], grid[1]),
        budget,
        images=len(features),
        features=features,
        rasters=video(frames, grid),
    )


def drawn(seed: int, ties: bool) -> tuple[Tensor, int, tuple[int, int]]:
    draw = torch.Generator().manual_seed(seed)
    frames, grid = 2 + seed % 4, (1 + seed % 3, 2 + seed % 3)
    count = frames * grid[0] * grid[1]
    if ties:  # of length 4
        return 2.0 * torch.randint(0, 2, (2, count, 16), generator=draw) - 1, frames, grid
    return torch.randn(2, count, 10, generator=draw), frames, grid


@pytest.mark.parametrize("ties", [True, False])
def test_evs_equals_the_card(ties: bool) -> None:
    for seed in range(150):
        features, frames, grid = drawn(seed, ties)
        count, size = features.shape[1], grid[0] * grid[1]
        k = 1 + seed * 3 % (count - 1)
        kept = Evs().select(view_of(Evs(), features, frames, grid, k)).indices
        for image in range(2):
            x = features[image].double()
            x = x / x.norm(dim=1, keepdim=True)
            score = [255.0] * size + [round(1 - float(x[i] @ x[i - size]), 6) for i in range(size, count)]
            assert kept[image].tolist() == sorted(sorted(range(count), key=lambda i: (-score[i], i))[:k]), seed


def test_evs_behind_another_cut_looks_where_the_frame_before_still_has_its_token() -> None:
    for seed in range(60):
        features, frames, grid = drawn(seed, ties=True)
        count, size = features.shape[1], grid[0] * grid[1]
        draw = torch.Generator().manual_seed(seed)
        left = torch.stack([torch.randperm(count, generator=draw)[: count - 2].sort().values for _ in range(2)])
        standing = features.gather(1, left[..., None].expand(-1, -1, 16))
        k = 1 + seed % (count - 3)
        view = dataclasses.replace(view_of(Evs(), standing, frames, grid, k), tokens=left, rasters=video(frames, grid))
        kept = Evs().select(view).indices
        for image in range(2):
            where = {token: place for place, token in enumerate(left[image].tolist())}
            score = []
            for token in left[image].tolist():
                before = where.get(token - size)
                x, y = features[image, token], features[image, token - size]
                score.append(255.0 if before is None else 1 - float(x @ y) / 16)
            order = sorted(range(count - 2), key=lambda i: (-score[i], i))
            assert kept[image].tolist() == sorted(order[:k]), seed


def test_evs_spreads_what_has_no_frame_before_it() -> None:
    kept = Evs().select(make_view(Evs(), (4, 5), 6, images=1)).indices[0].tolist()
    assert kept == [1, 5, 8, 11, 15, 18]


def by_hand(features: Tensor, frames: int, k: int) -> tuple[list[float], list[float]]:
    """Scores of tokens, smallest kept, and the rate of each frame."""
    n, d = features.shape
    x = features.double()
    variance = [float(x[:, c].var()) for c in range(d)]
    channels = sorted(range(d), key=lambda c: (variance[c], c))[: d // 2]
    rows = []
    for i in range(n):
        values = [float(x[i, c]) for c in channels]
        length = math.sqrt(sum(v * v for v in values))
        rows.append([v / length for v in values])
    mean = [sum(column) / n for column in zip(*rows)]
    size = n // frames

    def like(a: list[float], b: list[float]) -> float:
        squared = sum((p - q) ** 2 for p, q in zip(a, b))
        return sum(math.exp(-squared / (2 * width)) for width in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    score, unique = [], []
    for t in range(frames):
        part = rows[t * size : (t + 1) * size]
        centre = [sum(column) / size for column in zip(*part)]
        unique.append(-sum(like(row, mean) for row in part) / size)
        score += [like(row, mean) + like(row, centre) for row in part]
    top = max(unique)
    weights = [math.exp((u - top) / 0.01) for u in unique]
    p = [w / sum(weights) for w in weights]
    r = k / n
    return score, [min(1.0, r * (1 + each - sum(p) / frames)) for each in p]


def webster(shares: list[float], sizes: list[int], k: int) -> tuple[list[int], float]:
    """Counts, and by how much the closest decision was won."""
    gap = 1.0
    counts = [1 if k >= len(shares) else 0] * len(shares)
    while sum(counts) < k:
        open_to = [t for t in range(len(shares)) if counts[t] < sizes[t]]
        turn = {t: (counts[t] + 0.5) / max(shares[t], 1e-12) for t in open_to}
        first, *others = sorted(open_to, key=lambda t: (turn[t], t))
        gap = min([gap, *((turn[t] - turn[first]) / turn[first] for t in others)])
        counts[first] += 1
    return counts, gap


@pytest.mark.parametrize("total", ["exact", "official"])
def test_vidcom2_equals_the_card(total: str) -> None:
    method = VidCom2(total=total)
    compared = 0
    for seed in range(120):
        features, frames, grid = drawn(seed, ties=False)
        count, size = features.shape[1], grid[0] * grid[1]
        k = 1 + seed * 3 % (count - 1)
        selection = method.select(view_of(method, features, frames, grid, k))
        for image in range(2):
            score, rates = by_hand(features[image], frames, k)
            if total == "exact":
                counts, gap = webster([rate * size for rate in rates], [size] * frames, k)
                if gap < 1e-5:  # frames alike to rounding
                    continue
            else:
                counts = [min(size, max(1, round(rate * size))) for rate in rates]
            truth = []
            for t in range(frames):
                mine = range(t * size, (t + 1) * size)
                truth += sorted(mine, key=lambda i: (score[i], i))[: counts[t]]
            n = k if selection.counts is None else selection.counts[image]
            assert selection.indices[image, :n].tolist() == sorted(truth), seed
            compared += 1
    assert compared > 60


def test_equal_frames_share_equally_and_a_constant_frame_loses_first() -> None:
    frame = torch.randn(1, 6, 12)
    kept = VidCom2().select(view_of(VidCom2(), frame.repeat(1, 4, 1), 4, (2, 3), 8)).indices[0]
    assert (kept // 6).bincount(minlength=4).tolist() == [2, 2, 2, 2]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    features = torch.randn(1, 24, 12)
    one, other = (
        VidCom2().select(view_of(VidCom2(), f, 4, (2, 3), 9)).indices for f in (features, features[..., order])
    )
    assert torch.equal(one, other), "the order of channels does not matter"


def test_vidcom2_behind_another_cut_is_of_the_frames_that_are_left() -> None:
    """A frame that an earlier cut emptied is no frame: the others get the rates of a video without it."""
    for total in ("exact", "official"):
        method = VidCom2(total=total)
        for seed in range(40):
            draw = torch.Generator().manual_seed(seed)
            features, k = torch.randn(2, 24, 10, generator=draw), 4 + seed % 19
            alone = view_of(method, features, 4, (2, 3), k)
            left = torch.cat([torch.arange(12), torch.arange(18, 30)]).expand(2, -1)
            behind = dataclasses.replace(view_of(method, features, 5, (2, 3), k), features=features, tokens=left)
            truth, found = method.select(alone), method.select(behind)
            assert torch.equal(method.likeness(behind)[2][:, [0, 1, 3, 4]], method.likeness(alone)[2])
            assert truth.counts == found.counts and torch.equal(truth.indices, found.indices), (total, seed)


def test_vidcom2_official_decides_how_many_stay_and_all_stay_all() -> None:
    method = VidCom2(total="official")
    assert method.is_adaptive and not VidCom2().is_adaptive
    features = torch.randn(2, 24, 10)
    assert method.select(view_of(method, features, 4, (2, 3), 24)).indices.tolist() == [list(range(24))] * 2


def test_dealing_keeps_to_the_budget_whatever_the_shares() -> None:
    draw = torch.Generator().manual_seed(0)
    for seed in range(200):
        groups = 1 + seed % 6
        group_of = torch.randint(0, groups, (2, 20), generator=draw).sort(1).values
        scores, shares = torch.rand(2, 20, generator=draw), torch.rand(2, groups, generator=draw) * (seed % 3)
        k = 1 + seed % 19
        kept = deal(scores, group_of, shares, k)
        assert kept.shape == (2, k) and bool((kept.diff(dim=1) > 0).all())
        for image in range(2):
            sizes = group_of[image].bincount(minlength=groups)
            for g in range(groups):
                mine = (group_of[image] == g).nonzero()[:, 0]
                stays = [i for i in kept[image].tolist() if i in mine.tolist()]
                best = scores[image][mine].sort(descending=True, stable=True).indices[: len(stays)]
                assert stays == sorted(mine[best].tolist())
                if k >= int((sizes > 0).sum()) and sizes[g]:
                    assert stays, "one of each"


@pytest.mark.parametrize("name", ["vidcom2", "evs"])
@pytest.mark.parametrize("model", ["qwen2_vl", "llava_onevision", "llava_next_video"])
def test_videos_of_families_keep_the_budget(name: str, model: str) -> None:
    loaded = family(model)
    batch = batch_of(model, "mixed_left")
    with tokenprune.applied(loaded, name, keep=0.25) as handle, torch.no_grad():
        loaded(**batch)
    assert all(len(kept) for images in handle.kept for kept in images)
