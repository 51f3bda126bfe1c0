"""Pictures that a tower gets in crops, as vLLM's LLaVA-NeXT and LLaVA-OneVision pack them. Imports no vLLM."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from tokenprune.interfaces.crops import anyres_visual
from tokenprune.interfaces.visual import Visual


def crops_visual(config: Any, size: tuple[int, int], given: int | None, largest: int | None) -> Visual:
    """The layout of one picture: a thumbnail, and a mosaic of crops without its padding, a separator after each row.

    Args:
        config: the model's, of transformers.
        size: (height, width) of the picture.
        given: crops that the tower gets, those of padding among them; None where they are not there yet.
        largest: crops along which a mosaic may grow before it is interpolated down; None where it never is.
    """
    side, (rows, cols) = _side(config), mosaic_shape(config, size)
    crops = 1 + rows * cols

    def pack(values: Tensor, newline: Tensor) -> Tensor:
        mosaic = values[1:crops].view(rows, cols, side, side, -1).permute(4, 0, 2, 1, 3)  # [C, rows, side, cols, side]
        mosaic = _unpadded(mosaic.flatten(1, 2).flatten(2, 3), size)
        if largest is not None:
            mosaic = _smaller(mosaic, largest * side**2)
        ends = newline[:, None, None].to(mosaic).expand(*mosaic.shape[:-1], 1)
        return torch.cat([values[0], torch.cat([mosaic, ends], dim=-1).flatten(1).T])

    visual = anyres_visual(pack, crops, side)
    return visual if given in (None, crops) else _padded(visual, crops, given or 0, side)


def mosaic_shape(config: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of crops that a picture is cut into, the thumbnail left out."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    rows, cols = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    return int(rows), int(cols)


def _side(config: Any) -> int:
    return config.vision_config.image_size // config.vision_config.patch_size


def _unpadded(mosaic: Tensor, size: tuple[int, int]) -> Tensor:
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    return unpad_image(mosaic, size)


def _smaller(mosaic: Tensor, most: int) -> Tensor:
    """A mosaic `[C, h, w]` with not many more than `most` cells."""
    _, height, width = mosaic.shape
    ratio = math.sqrt(height * width / most)
    if ratio <= 1.1:
        return mosaic
    small = [int(height // ratio), int(width // ratio)]
    return torch.nn.functional.interpolate(mosaic[None], small, mode="bilinear")[0]


def _padded(visual: Visual, crops: int, given: int, side: int) -> Visual:
    """The same with crops of padding behind it: prompts of several pictures have them."""
    resample, cells = visual.resample, crops * side**2
    if resample is not None:
        return dataclasses.replace(
            visual, crops=((side, side),) * given, resample=lambda values: resample(values[:cells])
        )
    return dataclasses.replace(visual, crops=((side, side),) * given)
