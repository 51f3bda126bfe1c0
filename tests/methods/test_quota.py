"""QuoTA against its card, in plain Python, and the promises about its budget."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from _families import batch_of, family
from _views import make_view
from masked_reference import compare, run_pruned
from torch import Tensor

import tokenprune
from tokenprune.interfaces.visual import Raster
from tokenprune.methods.quota import Quota


def video(frames: int, grid: tuple[int, int]) -> tuple[Raster, ...]:
    return tuple(Raster(grid, t * grid[0] * grid[1], "frame") for t in range(frames))


def view_of(method: Quota, features: Tensor, grid: tuple[int, int], budget: int, scores: list[list[float]]):
    frames = features.shape[1] // (grid[0] * grid[1])
    return make_view(
        method, (frames * grid[0], grid[1]), budget, images=len(features), features=features,
        rasters=video(frames, grid), hints={"frame_scores": scores} if method.hints else {},
    )  # fmt: skip


def drawn(seed: int) -> tuple[int, int, int, list[float]]:
    """Frames, P, a budget and scores, with ties and zeros among them."""
    draw = torch.Generator().manual_seed(seed)
    frames, side = 1 + seed % 7, 1 + seed % 5
    most = frames * side**2
    k = [1, most - 1, 1 + int(torch.randint(most, (), generator=draw))][seed % 3]
    if seed % 4 == 0:
        scores = (torch.randint(0, 4, (frames,), generator=draw) / 4).tolist()
    else:
        scores = torch.rand(frames, generator=draw).tolist()
    return frames, side, max(1, min(k, most - 1)), scores


def shares(scores: list[float], k: int, side: int, cap: bool) -> list[Fraction]:
    """Steps 5 and 6 of the card, with capping and redistribution until nothing changes."""
    weight = [Fraction(p) ** 2 for p in scores]
    if sum(weight) < Fraction(1, 10**12):
        weight = [Fraction(1)] * len(scores)
    share = [k * w / sum(weight) for w in weight]
    if not cap:
        return [min(one, Fraction(side**2)) for one in share]
    full: set[int] = set()
    while True:
        over = {t for t in range(len(share)) if t not in full and share[t] > side**2}
        if not over:
            return share
        full |= over
        left = k - len(full) * side**2
        open_to = [t for t in range(len(share)) if t not in full]
        total = sum(weight[t] for t in open_to)
        for t in full:
            share[t] = Fraction(side**2)
        for t in open_to:
            share[t] = left * weight[t] / total if total else Fraction(left, len(open_to))


def card_grid(n: int) -> tuple[int, int]:
    s = math.isqrt(n)
    return (s + 1, s) if (s + 1) * s <= n else (s, s)


def larger(grid: tuple[int, int]) -> tuple[int, int]:
    h, w = grid
    return (1, 1) if not h else (h + 1, w) if h == w else (h, h)


def grids_by_hand(scores: list[float], k: int, side: int, cap: bool, nearest: bool) -> list[tuple[int, int]]:
    share = shares(scores, k, side, cap)
    grids = [card_grid(int(one)) if one >= 1 else (0, 0) for one in share]
    while nearest:
        left = k - sum(h * w for h, w in grids)
        found = []
        for t, (h, w) in enumerate(grids):
            high, wide = larger((h, w))
            deficit = share[t] - h * w
            fits = high <= side and high * wide - h * w <= left
            if fits and share[t] > 0 and (cap or deficit > 0):
                found.append((-deficit, t))
        if not found:
            break
        t = min(found)[1]
        grids[t] = larger(grids[t])
    if not any(h for h, _ in grids):
        grids[max(range(len(scores)), key=lambda t: (scores[t], -t))] = (1, 1)
    return grids


def bilinear(frame: Tensor, small: tuple[int, int]) -> Tensor:
    rows, cols, _ = frame.shape
    out = []
    for i in range(small[0]):
        for j in range(small[1]):
            parts = []
            for at, long, short in ((i, rows, small[0]), (j, cols, small[1])):
                x = max((at + 0.5) * long / short - 0.5, 0.0)
                low = int(x)
                parts.append([(low, 1 - (x - low)), (min(low + 1, long - 1), x - low)])
            out.append(sum(a * b * frame[y, x] for y, a in parts[0] for x, b in parts[1]))
    return torch.stack(out)


def pooled(frame: Tensor, small: tuple[int, int]) -> Tensor:
    rows, cols, _ = frame.shape
    out = []
    for i in range(small[0]):
        for j in range(small[1]):
            high = range(i * rows // small[0], math.ceil((i + 1) * rows / small[0]))
            wide = range(j * cols // small[1], math.ceil((j + 1) * cols / small[1]))
            out.append(torch.stack([frame[y, x] for y in high for x in wide]).mean(dim=0))
    return torch.stack(out)


@pytest.mark.parametrize("total", ["nearest", "official"])
@pytest.mark.parametrize("cap", [True, False])
def test_grids_equal_the_card(cap: bool, total: str) -> None:
    method = Quota(cap=cap, total=total)
    for seed in range(700):
        frames, side, k, scores = drawn(seed)
        truth = grids_by_hand(scores, k, side, cap, total == "nearest")
        found = [(0, 0) if rung is None else rung[2] for rung in method.grids(video(frames, (side, side)), k, scores)]
        assert found == truth, (seed, scores, k, side)


@pytest.mark.parametrize("resize", ["v1", "v2"])
def test_features_and_places_equal_the_card(resize: str) -> None:
    for seed in range(90):
        frames, side, k, scores = drawn(seed)
        draw = torch.Generator().manual_seed(seed)
        features = torch.randn(2, frames * side**2, 6, generator=draw)
        both = [scores, scores[::-1]]
        method = Quota(resize=resize)
        selection = method.select(view_of(method, features, (side, side), k, both)).validate(2, features.shape[1])
        for image in range(2):
            rows, places = [], []
            for t, small in enumerate(grids_by_hand(both[image], k, side, True, True)):
                frame = features[image, t * side**2 : (t + 1) * side**2].double().view(side, side, 6)
                if small[0]:
                    rows.append((bilinear if resize == "v1" else pooled)(frame, small))
                    middle = [[int((i + 0.5) * side / n) for i in range(n)] for n in small]
                    places += [t * side**2 + y * side + x for y in middle[0] for x in middle[1]]
            count = len(places)
            assert selection.counts is None or selection.counts[image] == count
            assert selection.indices[image, :count].tolist() == places, seed
            assert selection.features is not None
            torch.testing.assert_close(
                selection.features[image, :count].double(), torch.cat(rows), rtol=1e-5, atol=1e-6
            )


def test_evenly_spaced_tokens_keep_exactly_the_budget_and_are_unchanged() -> None:
    method = Quota(resize="v3")
    for seed in range(300):
        frames, side, k, scores = drawn(seed)
        features = torch.zeros(1, frames * side**2, 2)
        selection = method.select(view_of(method, features, (side, side), k, [scores])).validate(1, frames * side**2)
        assert selection.features is None and selection.indices.shape[1] == k
        share = shares(scores, k, side, True)
        counts = (selection.indices[0] // side**2).bincount(minlength=frames).tolist()
        assert all(abs(n - one) < 1 for n, one in zip(counts, share)), "the nearest whole numbers"
        for t, n in enumerate(counts):
            mine = [i - t * side**2 for i in selection.indices[0].tolist() if i // side**2 == t]
            step = Fraction(side**2 - 1, max(1, n - 1))
            assert mine == [int(i * step) for i in range(n)]


def test_properties_of_the_card() -> None:
    method = Quota(total="official", cap=False)
    for seed in range(400):
        frames, side, k, scores = drawn(seed)
        found = method.grids(video(frames, (side, side)), k, scores)
        counts = [0 if rung is None else rung[1] for rung in found]
        assert sum(counts) <= k
        assert all(rung is None or rung[2][0] - rung[2][1] in (0, 1) for rung in found)
        assert method.grids(video(frames, (side, side)), k, [8 * p for p in scores]) == found or sum(scores) == 0
        if k >= frames:
            for i in range(frames):
                assert all(counts[i] >= counts[j] for j in range(frames) if scores[i] >= scores[j])
        equal = method.grids(video(frames, (side, side)), k, [0.3] * frames)
        n = min(k // frames, side**2)
        if n:
            assert {rung and rung[2] for rung in equal} == {card_grid(n)}
        assert method.grids(video(frames, (side, side)), k, [0.0] * frames) == equal, "zeros weigh all alike"
        whole = method.grids(video(frames, (side, side)), frames * side**2, [0.3] * frames)
        assert {rung and rung[2] for rung in whole} == {(side, side)}


def test_a_whole_frame_is_the_frame_bit_for_bit_and_a_frame_without_tokens_is_dropped() -> None:
    features = torch.randn(1, 27, 5)
    for resize in ("v1", "v2"):
        method = Quota(resize=resize)
        selection = method.select(view_of(method, features, (3, 3), 18, [[1.0, 0.0, 1.0]]))
        assert selection.indices[0].tolist() == [*range(9), *range(18, 27)]
        assert selection.features is not None and selection.merged is not None
        assert torch.equal(selection.features[0], features[0, selection.indices[0]])
        assert selection.merged.tolist() == [0]


def test_the_floor_gives_each_frame_a_token_while_the_budget_lasts() -> None:
    for seed in range(300):
        frames, side, k, scores = drawn(seed)
        for total in ("nearest", "official"):
            found = Quota(floor=1, total=total).grids(video(frames, (side, side)), k, scores)
            assert sum(rung[0] for rung in found if rung) <= k
            served = {t for t, rung in enumerate(found) if rung}
            first = sorted(range(frames), key=lambda t: (-scores[t], t))[:k]
            assert served >= set(first)
    assert [rung and rung[1] for rung in Quota(floor=1).grids(video(3, (4, 4)), 8, [0.0, 1.0, 0.0])] == [1, 6, 1]


def test_counted_newlines_pay_for_row_ends() -> None:
    one = Quota(count_newlines=True)
    for seed in range(300):
        frames, side, k, scores = drawn(seed)
        found = [rung for rung in one.grids(video(frames, (side, side)), k, scores) if rung]
        cost = sum(rows * (cols + 1) for _, _, (rows, cols) in found)
        assert cost <= k or (k == 1 and [rung[2] for rung in found] == [(1, 1)])
    # (3, 3) would be 9 tokens; 12 with their row ends
    assert [rung and rung[2] for rung in one.grids(video(1, (4, 4)), 11, [1.0])] == [(3, 2)]
    assert [rung and rung[2] for rung in one.grids(video(1, (4, 4)), 12, [1.0])] == [(3, 3)]


@pytest.mark.parametrize("grid", [(2, 8), (8, 3), (1, 6), (5, 1)])
def test_frames_that_are_not_square_keep_their_shape_and_the_budget(grid: tuple[int, int]) -> None:
    for k in range(1, 3 * grid[0] * grid[1]):
        selection = Quota().select(
            view_of(Quota(), torch.zeros(1, 3 * grid[0] * grid[1], 2), grid, k, [[0.9, 0.5, 0.1]])
        )
        assert 1 <= selection.validate(1, 3 * grid[0] * grid[1]).indices.shape[1] <= k
    (rung,) = Quota().grids(video(1, (2, 8)), 7, [1.0])
    assert rung is not None and rung[2] == (1, 5), "2 x 3 and 1 x 6 are not of its shape"


def test_pictures_of_a_pair_share_a_frame_and_pictures_need_no_scores() -> None:
    rasters = video(2, (4, 4))
    assert Quota().grids(rasters, 9, [0.2, 0.4, 0.5, 0.7]) == Quota().grids(rasters, 9, [0.3, 0.6])
    picture = (Raster((4, 4)),)
    assert [rung and rung[2] for rung in Quota().grids(picture, 9, None)] == [(3, 3)]
    crops = tuple(Raster((4, 4), 16 * i, "crop") for i in range(2))
    assert [rung and rung[2] for rung in Quota().grids(crops, 8, None)] == [(2, 2), (2, 2)]


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([0.1, 0.2, 0.3], "3 scores, and it has 2 frames"),
        ([0.1, -0.2], "numbers from 0 on.*-0.2"),
        ([0.1, math.nan], "got nan"),
        (None, "a list of one score for each of its 2 frames"),
        ([], "0 scores"),
    ],
)
def test_scores_that_fit_no_video_are_refused(scores, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Quota().grids(video(2, (2, 2)), 4, scores)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resize": "v4"}, "resize must be one of v1, v2, v3, got 'v4'"),
        ({"scores": "hints"}, "Did you mean|hint"),
        ({"total": "exact"}, "total must be one of"),
        ({"floor": 2}, "floor must be 0 or 1"),
        ({"cap": 1.5}, "cap must be true or false"),
        ({"count_newlines": True, "resize": "v3"}, "makes none"),
        ({"scope": "raster"}, "its scope is 'visual'"),
    ],
)
def test_options_that_say_nothing_are_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Quota(**options)
    assert Quota(scope="visual") == Quota()


@pytest.mark.parametrize("options", [{}, {"resize": "v3", "scores": "uniform"}, {"resize": "v2", "floor": 1}])
@pytest.mark.parametrize("model", ["qwen2_vl", "llava_onevision", "llava_next_video"])
def test_videos_of_families_equal_the_masked_model(model: str, options: dict) -> None:
    batch = batch_of(model, "mixed_left")
    run = run_pruned(family(model), "quota", 0.3, batch, tokens=4, **options)
    compare(run, batch, 1e-5)


def test_who_gives_no_scores_is_told_where_they_come_from() -> None:
    batch = batch_of("qwen2_vl", "mixed_left")
    with tokenprune.applied(family("qwen2_vl"), "quota", 0.3) as handle, torch.no_grad():
        with pytest.raises(ValueError, match=r"set_hints\(frame_scores.*tokenprune.frame_scores\(model"):
            family("qwen2_vl")(**batch)
        handle.set_hints(frame_scores=[None, [0.1, 0.9, 0.1], [1.0, 0.0], None])
        family("qwen2_vl")(**batch)
        first = handle.kept[0][1].tolist()
        assert sum(i // 16 == 1 for i in first) > len(first) / 2 and all(i < 20 for i in handle.kept[1][0].tolist())


def test_half_precision_is_resized_in_fp32() -> None:
    features = torch.randn(1, 32, 6)
    for resize in ("v1", "v2"):
        view = view_of(Quota(resize=resize), features.half().float(), (4, 4), 9, [[0.7, 0.4]])
        full = Quota(resize=resize).select(view).features
        half = Quota(resize=resize).select(dataclasses.replace(view, features=features.half())).features
        assert full is not None and half is not None and torch.equal(full.half(), half)
