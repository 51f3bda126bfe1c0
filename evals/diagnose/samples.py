"""Samples as a model is given them, and pictures of what it looked at in some."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from tokenprune.evals.diagnose.batch_reader import BatchReader
from tokenprune.evals.io.picture_reader import read_picture
from tokenprune.evals.models.load import LoadedModel
from tokenprune.evals.report.overlay import seen_views
from tokenprune.evals.tasks.task import Sample

_SIDE = 168  # pixels of a picture on the page
_HOT = (214, 60, 30)


@dataclass(frozen=True)
class Shown:
    """One sample on the page.

    Attributes:
        picture: as the model saw it, a JPEG as a data URI.
        size: (width, height) on the page.
        layers: numbers of the layers that are shown.
        maps: for each of them, where the row that writes the first token looks, a PNG with a pixel a cell.
    """

    sample_id: str
    question: str
    answer: str
    said: str
    right: bool | None
    picture: str
    size: tuple[int, int]
    layers: tuple[int, ...]
    maps: tuple[str, ...]


def model_inputs(loaded: LoadedModel, samples: Sequence[Sample]) -> dict[str, Any]:
    """Processor output for a batch, left padded."""
    return dict(loaded.inputs([sample.question for sample in samples], [sample.image for sample in samples]))


def shown_sample(
    loaded: LoadedModel, sample: Sample, said: str, right: bool | None, reader: BatchReader, row: int
) -> Shown | None:
    """A sample with its maps; None where its first view is no grid of all of its tokens, or of one frame of them."""
    view = seen_views(loaded, model_inputs(loaded, [sample]), sample.visuals[0])[0]
    places = reader.tokens.visual[row].nonzero()[:, 0]
    raster = view.raster
    if raster.kind not in ("image", "frame") or view.visual or len(places) % raster.num_tokens:
        return None
    chosen = _spread(reader.layers, 8)
    cells = places[raster.start : raster.start + raster.num_tokens]
    maps = [reader.looks(layer)[row, cells].view(raster.grid).float().cpu().numpy() for layer in chosen]
    width, height = view.picture.size
    scale = _SIDE / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Shown(
        sample.sample_id, sample.question, str(sample.answer), said, right, _jpeg(view.picture.resize(size)), size,
        tuple(chosen), tuple(map(_heat, maps)),
    )  # fmt: skip


def _spread(count: int, most: int) -> list[int]:
    """At most so many of `range(count)`, evenly."""
    return sorted({round(i * (count - 1) / max(min(count, most) - 1, 1)) for i in range(min(count, most))})


def _heat(values: np.ndarray) -> str:
    """Attention as the opacity of one colour, the largest full."""
    alpha = np.sqrt(values / max(float(values.max()), 1e-30))  # small values stay visible
    pixels = np.concatenate([np.full((*values.shape, 3), _HOT), 230 * alpha[..., None]], axis=2).astype(np.uint8)
    return _encoded(Image.fromarray(pixels, "RGBA"), "PNG", optimize=True)


def _jpeg(picture: Image.Image) -> str:
    return _encoded(read_picture(picture), "JPEG", quality=80)


def _encoded(picture: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
