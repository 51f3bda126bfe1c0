"""Pictures of what a method keeps: the image as the model saw it, with the dropped patches dimmed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tokenprune.engine.prompt_reader import prompt_visuals
from tokenprune.evals.config.points import NONE, Point
from tokenprune.evals.io.picture_reader import read_picture
from tokenprune.evals.models.load import LoadedModel
from tokenprune.interfaces.visual import Raster

DIM = 0.22
"""Brightness left to a dropped patch."""


def seen_picture(pixel_values: Any, processor: Any) -> Image.Image:
    """The picture that one image's `pixel_values` show, `[C, H, W]`: resized and cropped as the model gets it."""
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
    pixels = np.asarray(read_picture(picture)).astype(np.float32)
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


class SeenView(NamedTuple):
    """A picture, the raster of visual tokens that lies over it, and which visual of the prompt the raster is of."""

    picture: Image.Image
    raster: Raster
    visual: int = 0


_SCALE = 14  # pixels a token where the picture is drawn anew
_MOST = 13  # views that are drawn: twelve tiles and a thumbnail


def seen_views(
    loaded: LoadedModel, inputs: Mapping[str, Any], image: Image.Image | list[Image.Image]
) -> list[SeenView]:
    """The picture of a prompt as its visual tokens lie over it: once for a plain image, once for the thumbnail and once
    for the mosaic of a picture in crops, once a tile where the model gets tiles, once a raster of a video.

    Args:
        inputs: of one prompt with one picture or video, as the processor made them.
        image: the picture, or the frames of the video, as it was handed to the processor.
    """
    kind = "video" if isinstance(image, list) else "image"
    # families without a kind of visual for videos get frames as pictures
    own_kind = kind if kind in loaded.adapter.features else "image"
    visuals = prompt_visuals(loaded.adapter, own_kind, inputs)
    rasters = [(raster, which) for which, visual in enumerate(visuals) for raster in visual.rasters]
    if isinstance(image, list):
        step = max(1, len(image) // len(rasters))  # several frames may share a raster: the first is shown
        frames = enumerate(rasters[:_MOST])
        return [SeenView(_drawn(image[number * step], raster), raster, which) for number, (raster, which) in frames]
    pixels = inputs[loaded.adapter.pixels[own_kind]]
    views: list[SeenView] = []
    for number, (raster, which) in enumerate(rasters[:_MOST]):
        tile = pixels[number] if pixels.dim() == 4 else pixels[0, number] if raster.kind == "crop" else None
        if tile is not None and raster.kind in ("image", "crop"):
            views.append(SeenView(seen_picture(tile, loaded.processor), raster, which))
        else:
            views.append(SeenView(_drawn(image, raster), raster, which))
    return views


def _drawn(picture: Image.Image, raster: Raster) -> Image.Image:
    size = (raster.grid[1] * _SCALE, raster.grid[0] * _SCALE)
    return read_picture(picture).resize(size, Image.Resampling.BICUBIC)


def draw_kept(views: Sequence[SeenView], point: Point, images: list[list[int]]) -> Image.Image:
    """The overlay of one sample at one point, its views side by side.

    Args:
        views: see `seen_views`.
        images: kept indices of the sample's visuals.
    """
    from tokenprune.plan.expression import pruner_parts, split_name
    from tokenprune.registry import METHODS

    if point.method == NONE:
        return draw_places(views, [])
    pruners = [METHODS.get(split_name(part)[0]) for part in pruner_parts(point.method)]
    return draw_places(views, images, any(pruner.site == "pixels" and not pruner.cuts_pixels for pruner in pruners))


def draw_places(views: Sequence[SeenView], images: list[list[int]], shrinks: bool = False) -> Image.Image:
    """Views side by side, dimmed where nothing was kept.

    Args:
        views: see `seen_views`.
        images: kept indices of the sample's visuals; [] shows the views as they are.
        shrinks: whether fewer tokens mean fewer pixels of the whole picture.
    """
    drawn = [_draw_view(view, images, shrinks) for view in views]
    if len(drawn) == 1:
        return drawn[0]
    gap = 8
    sheet = Image.new("RGB", (sum(d.width + gap for d in drawn) - gap, max(d.height for d in drawn)), "white")
    left = 0
    for picture in drawn:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    return sheet


def _draw_view(view: SeenView, images: list[list[int]], shrinks: bool) -> Image.Image:
    picture, raster, visual = view
    if not images:
        return picture
    start, count = raster.start, raster.num_tokens
    kept = [index - start for index in images[visual] if start <= index < start + count]
    if shrinks and 0 < len(kept) < count:
        # nothing is dropped: the whole picture is seen, with fewer pixels
        small = square_grid(len(kept), picture.size) if _has_raster(len(kept), picture.size) else raster.grid
        return shrunk(picture, small, picture.size[0] // raster.grid[1])
    return dim_dropped(picture, kept, raster.grid)


def _has_raster(num_tokens: int, size: tuple[int, int]) -> bool:
    try:
        square_grid(num_tokens, size)
    except ValueError:
        return False
    return True
