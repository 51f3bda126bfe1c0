"""PixelPrune against its card, rule by rule, and the cut before the first block of the vision tower."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from _families import BUILDERS, _qwen_batch, batch_of, family
from _views import make_view
from _zoo_all import zoo_model
from masked_reference import compare, run_pruned

import tokenprune
from tokenprune.api import adapter_for
from tokenprune.interfaces.signals import TowerInfo
from tokenprune.methods.pixelprune import PixelPrune

PLAIN = TowerInfo(4, 3, False, 2, 8, pixel_mean=(0.0, 0.0, 0.0), pixel_std=(1.0, 1.0, 1.0))
DISTANCE = {
    "max": lambda a, b: np.abs(a - b).max(),
    "mae": lambda a, b: np.abs(a - b).mean(),
    "rmse": lambda a, b: np.sqrt(((a - b) ** 2).mean()),
}
CUT = [name for name in BUILDERS if adapter_for(family(name)).vision.can_cut]


def by_hand(g, metric, tau, anchored):
    """The card's rule cell by cell on `g` [H, W, P]; which stay, and what a decoder makes of them."""
    rows, cols = g.shape[:2]
    seen, kept = g.copy(), []

    def sim(a, b):
        return DISTANCE[metric](a, b) <= tau

    for r in range(rows):
        for c in range(cols):
            if (r, c) == (0, 0):
                kept.append(0)
                continue
            if r == 0:
                pred = seen[0, c - 1]
            elif c == 0:
                pred = seen[r - 1, 0]
            else:
                left, above, corner = seen[r, c - 1], seen[r - 1, c], seen[r - 1, c - 1]
                pred = above if sim(corner, left) and not sim(corner, above) else left
            if not sim(g[r, c], pred):
                kept.append(r * cols + c)
            elif anchored:
                seen[r, c] = pred
    return kept, seen


def capped_by_hand(g, metric, tau, anchored, cap):
    kept, seen = by_hand(g, metric, tau, anchored and tau > 0)
    if len(kept) <= cap:
        return kept, seen
    low, high = tau, max(1.001 * (g.max() - g.min()), tau)
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if len(by_hand(g, metric, middle, anchored)[0]) <= cap else (middle, high)
    return by_hand(g, metric, high, anchored)


def chosen(method, pictures, budget=None):
    """Kept cells of each of `pictures` [M, H, W, P]."""
    pictures = torch.as_tensor(pictures, dtype=torch.float32)
    grid = (pictures.shape[1], pictures.shape[2])
    budget = grid[0] * grid[1] if budget is None else budget
    view = make_view(method, grid, budget, len(pictures), features=pictures.flatten(1, 2), tower=PLAIN)
    selection = method.select(view).validate(len(pictures), grid[0] * grid[1])
    return [selection.indices[m, : selection.counts[m]].tolist() for m in range(len(pictures))]


def drawn(seed, grid=None, images=2):
    """Pictures of few values, multiples of 1/32: many equal cells, and distances that are exactly tau."""
    draw = np.random.default_rng(seed)
    rows, cols = grid or (int(draw.integers(1, 8)), int(draw.integers(1, 8)))
    steps = draw.integers(0, 1 + seed % 6, (images, rows, cols, 1)) * np.ones(3)
    if seed % 3 == 0:
        steps = steps + draw.integers(0, 2, (images, rows, cols, 3))
    return steps / 32


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("metric", list(DISTANCE))
def test_equals_the_card_cell_by_cell(metric, anchored):
    cells = left = 0
    for seed in range(120):
        g = drawn(seed)
        # at a threshold the mean of three and its root round as they like, so tau is never one of their values there
        tau = (0, 1 / 32, 2 / 32, 3 / 32)[seed % 4] if metric == "max" else (0, 0.013, 0.04, 0.07)[seed % 4]
        for picture, kept in zip(g, chosen(PixelPrune(tau=tau, metric=metric, anchored=anchored), g)):
            assert kept == by_hand(picture, metric, tau, anchored)[0], seed
            cells, left = cells + picture.shape[0] * picture.shape[1], left + len(kept)
    assert cells > 2000 and 0.2 < left / cells < 0.95


@pytest.mark.parametrize("anchored", [False, True])
def test_a_cap_raises_tau_in_the_pictures_that_are_above_it(anchored):
    bitten = 0
    for seed in range(60):
        g, method = drawn(seed, images=3), PixelPrune(anchored=anchored, tau=(0, 1 / 32)[seed % 2])
        cap = 1 + seed % max(1, g.shape[1] * g.shape[2] - 1)
        for picture, kept in zip(g, chosen(method, g, cap)):
            assert kept == capped_by_hand(picture, "max", method.tau, anchored, cap)[0], seed
            assert 1 <= len(kept) <= cap
            bitten += kept != by_hand(picture, "max", method.tau, anchored)[0]
    assert bitten > 40


@pytest.mark.parametrize("metric", list(DISTANCE))
def test_a_cap_of_one_token_holds_on_any_picture(metric):
    extreme = np.zeros((1, 5, 6, 3))
    extreme[:, ::2, ::2] = 1 / 3
    noise = np.random.default_rng(0).random((1, 5, 6, 3))
    for picture in (extreme, noise, 1e3 * noise - 500):
        assert chosen(PixelPrune(metric=metric), picture, 1) == [[0]]


def test_a_constant_picture_is_one_token():
    assert chosen(PixelPrune(), np.full((1, 6, 7, 3), 0.3)) == [[0]]


@pytest.mark.parametrize("box", [(1, 1, 2, 2), (1, 2, 4, 5), (3, 1, 6, 4), (2, 3, 3, 6)])
def test_a_flat_rectangle_is_four_tokens(box):
    top, start, bottom, end = box
    g = np.zeros((1, 7, 8, 3))
    g[:, top:bottom, start:end] = 0.5
    assert chosen(PixelPrune(), g) == [sorted([0, top * 8 + start, top * 8 + end, bottom * 8 + start])]


def test_stripes_are_one_row_or_one_column():
    across = np.arange(7)[None, None, :, None] * np.ones((1, 5, 1, 3)) / 8
    assert chosen(PixelPrune(), across) == [list(range(7))]
    down = np.arange(5)[None, :, None, None] * np.ones((1, 1, 7, 3)) / 8
    assert chosen(PixelPrune(), down) == [list(range(0, 35, 7))]


def decoded(picture, kept, tau):
    """Cells that left, filled in raster order from those before them."""
    rows, cols = picture.shape[:2]
    out = np.full_like(picture, np.nan)
    for cell in range(rows * cols):
        r, c = divmod(cell, cols)
        if cell in kept:
            out[r, c] = picture[r, c]
        elif r == 0 or c == 0:
            out[r, c] = out[r, c - 1] if r == 0 else out[r - 1, c]
        else:
            left, above, corner = out[r, c - 1], out[r - 1, c], out[r - 1, c - 1]
            up = DISTANCE["max"](corner, left) <= tau < DISTANCE["max"](corner, above)
            out[r, c] = above if up else left
    return out


def test_a_decoder_gets_the_picture_back():
    for seed in range(60):
        g = drawn(seed)
        for tau in (0, 2 / 32):
            for picture, kept in zip(g, chosen(PixelPrune(tau=tau), g)):
                assert np.abs(decoded(picture, kept, tau) - picture).max() <= tau


def test_both_ways_agree_at_zero_and_part_above_it():
    parted = 0
    for seed in range(80):
        g = drawn(seed, (6, 7))
        assert chosen(PixelPrune(anchored=True), g) == chosen(PixelPrune(anchored=False), g)
        slid, held = (chosen(PixelPrune(anchored=way, tau=1 / 32), g) for way in (False, None))
        assert held == chosen(PixelPrune(anchored=True, tau=1 / 32), g)
        parted += slid != held
    assert parted > 5


def test_a_picture_is_cut_the_same_among_others():
    for seed in range(6):
        g, cap = drawn(seed, (5, 6), images=4), 3 + 4 * seed
        together = chosen(PixelPrune(), g, cap)
        assert together == [chosen(PixelPrune(), picture[None], cap)[0] for picture in g]
        assert all(row[0] == 0 and row == sorted(set(row)) for row in together)


def test_distances_are_those_of_pixels_before_normalisation():
    levels = np.zeros((1, 1, 2, 6), np.float32)
    levels[0, 0, 1, 2:4] = 0.1  # green
    std = (0.2, 0.5, 0.25)
    normalised = torch.from_numpy((levels - 0.4) / np.repeat(std, 2).astype(np.float32))
    for tau, count in ((0.099, 2), (0.101, 1)):
        method = PixelPrune(tau=tau, mean=(0.4,) * 3, std=std)
        assert len(chosen(method, normalised)[0]) == count
        tower = dataclasses.replace(PLAIN, pixel_mean=(0.4,) * 3, pixel_std=std)
        view = make_view(PixelPrune(tau=tau), (1, 2), 2, 1, features=normalised.flatten(1, 2), tower=tower)
        assert PixelPrune(tau=tau).select(view).counts == [count]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": -0.1}, "tau must be a distance of pixels from 0 on, got -0.1"),
        ({"tau": float("nan")}, "tau must be"),
        ({"metric": "cosine"}, "metric must be one of max, mae, rmse, got 'cosine'"),
        ({"anchored": "yes"}, "anchored must be true or false"),
        ({"std": (1.0,)}, "std must be three numbers"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PixelPrune(**options)


def test_nan_pixels_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        chosen(PixelPrune(), np.full((1, 2, 2, 3), np.nan))


# --- on models ------------------------------------------------------------------------------------------------------


def screen(batch, name):
    """The batch with flat pictures in which few cells stand out."""
    adapter = adapter_for(family(name))
    pixels, batch = batch["pixel_values"], dict(batch)
    flat = torch.full_like(pixels, 0.25)
    if name.startswith("qwen"):
        group = adapter.vision.patches_per_cell
        flat = flat.unflatten(0, (-1, group))
        flat[7::11] = pixels.unflatten(0, (-1, group))[7::11]
        flat = flat.flatten(0, 1)
    else:
        flat[..., 7:14, 14:21] = pixels[..., 7:14, 14:21]
        flat *= (pixels != 0).flatten(-3).any(-1)[..., None, None, None]  # tiles that fill up a batch are black
    batch["pixel_values"] = flat
    return batch


@pytest.mark.parametrize("name", CUT)
def test_noise_changes_no_bit(name):
    model, batch = family(name), batch_of(name, "ragged_left")
    if "image_sizes" in batch:  # crops of nothing are flat, and cells of them leave
        batch["pixel_values"] = torch.randn(batch["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(**batch).logits
        with tokenprune.applied(model, "pixelprune", 1.0) as handle:
            assert torch.equal(model(**batch).logits, plain)
            assert handle.report().flops == handle.report().flops_unpruned


@pytest.mark.parametrize("name", CUT)
def test_a_screen_is_cut_before_the_first_block(name):
    """Removal equals masking, kept cells are those of the rule, and the tower's blocks do no work for what left."""
    batch = screen(batch_of(name, "ragged_left"), name)
    run = run_pruned(family(name), "pixelprune", 1.0, batch, tokens=4)
    compare(run, batch, 1e-5)
    report, ((_, work),) = run["report"], run["tower"]
    cells = sum(rows * cols for rows, cols in work.grids)
    group = adapter_for(family(name)).vision.patches_per_cell
    inside = sum(work.blocks[0]) / group
    # what shuffles cells behind the blocks gets all of them
    assert work.first == 0 and work.cuts[0][0] == -1 and inside < cells / 2 and work.left in (inside, cells)
    assert len({sum(block) for block in work.blocks}) == 1
    assert report.flops.vision < 0.6 * report.flops_unpruned.vision


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_kept_cells_of_a_model_are_those_of_the_rule(name):
    """The first moment of an image's patches counts, by cell in raster order."""
    samples = [[(6, 6)], [(5, 7), (4, 9)]]
    batch = screen(_qwen_batch(name, samples, "left", 3), name)
    batch["pixel_values"].view(-1, 3, 2, 16)[:, :, 1] = torch.randn(len(batch["pixel_values"]), 3, 16)
    with tokenprune.applied(family(name), "pixelprune", 1.0) as handle, torch.no_grad():
        family(name)(**batch)
    sizes = [(6, 6), (5, 7), (4, 9)]
    parts = batch["pixel_values"].split([4 * r * c for r, c in sizes])
    for (r, c), part, kept in zip(sizes, parts, [k for row in handle.kept for k in row], strict=True):
        g = part.view(r, c, 4, 3, 2, 16)[:, :, :, :, 0].flatten(2).numpy()
        assert kept.tolist() == by_hand(g, "max", 0, False)[0]


@pytest.mark.parametrize("name", CUT)
def test_other_cuts_come_behind_it(name):
    plan = [
        {"prune": "pixelprune", "keep": 14},
        {"at": "vision:0", "prune": "random", "keep": 8, "positions": "keep"},
        {"at": "layer:2", "prune": "fastv", "keep": 4},
    ]
    batch = batch_of(name, "ragged_left")
    compare(run_pruned(family(name), plan, None, batch, tokens=4), batch, 1e-5)


def test_where_it_cannot_act_it_says_so():
    with pytest.raises(ValueError, match="cuts before the vision tower.*cannot be cut: its adapter says so"):
        tokenprune.apply(zoo_model("video_llava"), "pixelprune@9")
    with pytest.raises(ValueError, match="acts at 'pixels', not at 'input'"):
        tokenprune.apply(family("llava"), {"prune": "pixelprune", "at": "input", "keep": 9})
    with pytest.raises(ValueError, match="Two stages act at 'pixels'"):
        tokenprune.apply(family("qwen2_vl"), ["pixelprune@9", "downsample@9"])
