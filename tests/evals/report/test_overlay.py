"""Overlays dim what was dropped and touch nothing that was kept."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tokenprune.evals.config.points import Point
from tokenprune.evals.report.overlay import SeenView, dim_dropped, draw_kept, seen_picture, square_grid
from tokenprune.evals.tasks.load import load_task
from tokenprune.evals.tasks.task import drawn_samples
from tokenprune.interfaces.visual import Raster


def test_kept_patches_stay_and_dropped_ones_dim():
    pixels = np.random.default_rng(0).integers(100, 255, (28, 42, 3), dtype=np.uint8)
    drawn = np.asarray(dim_dropped(Image.fromarray(pixels), [0, 7, 23], (4, 6)))
    for index in range(24):
        row, col = divmod(index, 6)
        block = (slice(7 * row, 7 * row + 7), slice(7 * col, 7 * col + 7))
        if index in (0, 7, 23):
            assert (drawn[block] == pixels[block]).all()
        else:
            assert (drawn[block] < 0.3 * pixels[block].max()).all()


def test_grid_follows_the_shape_of_the_picture():
    assert square_grid(576, (336, 336)) == (24, 24)
    assert square_grid(600, (600, 420)) == (20, 30)
    with pytest.raises(ValueError, match="7 visual tokens form no raster"):
        square_grid(7, (336, 336))


def test_the_picture_is_what_the_model_saw(tiny):
    image = Image.new("RGB", (42, 42), (10, 120, 250))
    inputs = tiny.inputs(["what"], [image])
    seen = np.asarray(seen_picture(inputs["pixel_values"][0], tiny.processor))
    assert seen.shape == (42, 42, 3) and (abs(seen.astype(int) - [10, 120, 250]) <= 1).all()


def test_downsample_shows_fewer_pixels_and_unpruned_the_picture():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (42, 42, 3), dtype=np.uint8))
    whole = draw_kept([SeenView(picture, Raster((6, 6)))], Point("m", "t", "none", None), [])
    assert whole is picture
    small = draw_kept(
        [SeenView(picture, Raster((6, 6)))], Point("m", "t", "downsample", 9), [[7, 9, 11, 19, 21, 23, 31, 33, 35]]
    )
    assert small.size == picture.size and np.asarray(small).std() < np.asarray(picture).std()


def test_drawn_samples_are_of_different_families(tiny_task):
    import dataclasses

    task = load_task(tiny_task)
    assert drawn_samples(task, 3, None) == [0, 1, 2]
    seven = dataclasses.replace(task, families=tuple("abcdefg"))
    assert drawn_samples(seven, 5, 60) == [0, 8, 16, 24, 32]
    assert drawn_samples(seven, 5, 20) == [0, 1, 2, 3, 4]
    assert drawn_samples(seven, 0, 20) == []
    assert drawn_samples(task, 5, 2) == [0, 1]
