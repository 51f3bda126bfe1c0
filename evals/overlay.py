"""Pictures of what a method keeps: the image as the model saw it, with the dropped patches dimmed."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from tokenprune.evals.config import NONE, Point

DIM = 0.22
"""Brightness left to a dropped patch."""


def seen_picture(pixel_values: Any, processor: Any) -> Image.Image:
    """The picture behind one image's `pixel_values` `[C, H, W]`: resized and cropped as the model gets it."""
    settings = processor.image_processor
    pixels = pixel_values.detach().float().cpu().numpy()
    mean = np.asarray(settings.image_mean, dtype=np.float32)[:, None, None]
    std = np.asarray(settings.image_std, dtype=np.float32)[:, None, None]
    values = np.clip((pixels * std + mean) * 255.0 + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(values.transpose(1, 2, 0)))


def square_grid(num_tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, cols) of a raster of `num_tokens` with the shape of a picture of `size` (width, height).

    Raises:
        ValueError: no raster of that many tokens has nearly that shape.
    """
    width, height = size
    fits = [rows for rows in range(1, num_tokens + 1) if num_tokens % rows == 0]
    rows = min(fits, key=lambda r: abs(np.log((r * width) / (num_tokens // r * height))))
    if not 0.8 < (rows * width) / (num_tokens // rows * height) < 1.25:
        raise ValueError(f"{num_tokens} visual tokens form no raster with the shape of a {width} x {height} picture.")
    return rows, num_tokens // rows


def dim_dropped(picture: Image.Image, kept: list[int], grid: tuple[int, int]) -> Image.Image:
    """`picture` with the patches that are not in `kept` (raster indices) darkened and drained of colour."""
    pixels = np.asarray(picture.convert("RGB")).astype(np.float32)
    height, width = pixels.shape[:2]
    stays = np.zeros(grid[0] * grid[1], dtype=bool)
    stays[kept] = True
    rows = np.minimum(np.arange(height) * grid[0] // height, grid[0] - 1)
    cols = np.minimum(np.arange(width) * grid[1] // width, grid[1] - 1)
    mask = stays.reshape(grid)[rows[:, None], cols[None, :], None]
    grey = pixels.mean(axis=2, keepdims=True)
    dimmed = DIM * (0.3 * pixels + 0.7 * grey)
    return Image.fromarray(np.where(mask, pixels, dimmed).astype(np.uint8))


def shrunk(picture: Image.Image, grid: tuple[int, int], patch: int) -> Image.Image:
    """What is left of `picture` when a method shows the tower only `grid` patches of it, blown up again."""
    small = picture.resize((grid[1] * patch, grid[0] * patch), Image.Resampling.BICUBIC)
    return small.resize(picture.size, Image.Resampling.NEAREST)


def draw_kept(picture: Image.Image, point: Point, images: list[list[int]], num_tokens: int) -> Image.Image:
    """The overlay of one sample at one point.

    Args:
        picture: see `seen_picture`.
        images: kept raster indices of the sample's images; the first is drawn.
        num_tokens: visual tokens of that image before pruning.
    """
    if point.method == NONE or not images:
        return picture
    from tokenprune.registry import METHODS

    grid = square_grid(num_tokens, picture.size)
    if METHODS.get(point.method).site == "pixels" and len(images[0]) < num_tokens:
        # nothing is dropped: the whole picture is there, with fewer pixels
        small = square_grid(len(images[0]), picture.size) if _has_raster(len(images[0]), picture.size) else grid
        return shrunk(picture, small, picture.size[0] // grid[1])
    return dim_dropped(picture, images[0], grid)


def _has_raster(num_tokens: int, size: tuple[int, int]) -> bool:
    try:
        square_grid(num_tokens, size)
    except ValueError:
        return False
    return True
