"""Looking twice: a branch says which region of a picture a question is about, and the prompt gets it once more.

The two passes of SD-RPN (arXiv 2509.16944; the method `sd_rpn` is their one-pass use). A crop is simply another picture
of the prompt, so the processor and `generate` of the model do everything else:

    inputs, boxes = tokenprune.zoomed(model, processor, text, picture, branch="runs/sd_rpn")
    model.generate(**inputs)

Official, as read in the code: 3 x 3 Gaussian blur (sigma 1) of the sigmoid, threshold tau, 8-connected components, none
of one cell, small ones grown to about 3 x 3, none of more than 225 cells; with more than two boxes, or none, the prompt
stays as it is. Our choices: tau 0.1 for all tasks; always the box mode, each crop at the size and with the tokens that
the processor gives it (the official default masks them); a crop is grown to no less than 28 pixels a side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tokenprune.api import applied
from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection
from tokenprune.interfaces.signals import Signal, TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.plan.parse import make_method

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[int, int, int, int]
"""In cells or pixels: left, top, right, bottom, the last two exclusive."""

LEAST, MOST, SMALL = 2, 225, 4
SMALLEST_CROP = 28


@dataclass
class _Reader(Pruner):
    """Keeps every token and hands what it read to `found`."""

    name: ClassVar[str] = "region_map"
    site: ClassVar[str] = "layer"
    default_scope: ClassVar[str] = "visual"
    adaptive: ClassVar[bool] = True

    reads: Any = None
    found: Any = None

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        return self.reads.signals_at(tower, place, depth)

    def select(self, view: View) -> Selection:
        if len(view.rasters) == 1:
            self.found.append((self.reads.score(view), view.rasters[0].grid))
        return Selection(torch.arange(view.num_tokens, device=view.features.device).expand(view.num_images, -1))


@torch.no_grad()
def region_map(model: Any, inputs: Mapping[str, Any], branch: str) -> Tensor:
    """`[rows, cols]` fp32 logits of a branch for the one picture of one prompt; one pass over the prompt.

    Args:
        model: nothing may be applied to it.
        inputs: of the processor.
        branch: see `tokenprune.methods.sd_rpn.SdRpn`.

    Raises:
        ValueError: the prompt has not one picture that is a single grid of tokens.
    """
    from tokenprune.api import adapter_for
    from tokenprune.interfaces.budget import Budget
    from tokenprune.wrappers import unwrap

    method = make_method("sd_rpn", branch=branch)
    (stage,) = method.stages(Budget(1.0), adapter_for(unwrap(model)).depths)
    found: list[tuple[Tensor, tuple[int, int]]] = []
    reader = _Reader(reads=stage.pruner, found=found)
    with applied(model, {"at": stage.site, "prune": reader, "keep": 1.0}):
        model(**inputs)
    if len(found) != 1 or found[0][0].shape[0] != 1:
        raise ValueError(
            "A region is looked for in one picture that is one grid of tokens, and this prompt has "
            f"{sum(len(values) for values, _ in found)} of that kind."
        )
    values, grid = found[0]
    return values[0].view(grid)


def smoothed(logits: Tensor) -> Tensor:
    """Sigmoid of `[rows, cols]` and a 3 x 3 Gaussian blur (sigma 1); beyond the edge its cells are mirrored."""
    line = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0]) ** 2) / 2)
    kernel = line[:, None] * line / line.sum() ** 2
    wide = logits.float().cpu().sigmoid()[None, None]
    for dim in (2, 3):
        size = wide.shape[dim]
        index = torch.tensor([min(1, size - 1), *range(size), max(0, size - 2)])
        wide = wide.index_select(dim, index)
    return torch.nn.functional.conv2d(wide, kernel[None, None])[0, 0]


def boxes_of(mask: Tensor) -> list[Box]:
    """Boxes in cells around the 8-connected components of `[rows, cols]` bool, in the order of their first cells; small
    components are grown, single cells and very large ones skipped, see the module."""
    rows, cols = mask.shape
    on = {(int(r), int(c)) for r, c in mask.nonzero()}
    boxes = []
    while on:
        start = min(on)
        on.discard(start)
        part, edge = [start], [start]
        while edge:
            row, col = edge.pop()
            near = {(row + y, col + x) for y in (-1, 0, 1) for x in (-1, 0, 1)} & on
            on -= near
            part += near
            edge += near
        if not LEAST <= len(part) <= MOST:
            continue
        top, left = min(r for r, _ in part), min(c for _, c in part)
        bottom, right = max(r for r, _ in part) + 1, max(c for _, c in part) + 1
        if len(part) < SMALL:
            top, bottom = _grown(top, bottom, 3, rows)
            left, right = _grown(left, right, 3, cols)
        boxes.append((left, top, right, bottom))
    return boxes


def _grown(low: int, high: int, least: int, size: int) -> tuple[int, int]:
    """A span of at least `least` places around one in `range(size)`."""
    wide = max(high - low, min(least, size))
    low = min(max(0, low - (wide - (high - low) + 1) // 2), size - wide)
    return low, low + wide


def picture_window(processor: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom, in pixels of a picture of `size` (width, height), of what the tower sees of it: all,
    or the middle square where the processor crops it; padding to a square lies outside the picture."""
    width, height = size
    images = getattr(processor, "image_processor", processor)
    if getattr(images, "do_center_crop", False):
        side = min(width, height)
        return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2
    if getattr(images, "do_pad", False) and not hasattr(images, "min_pixels"):
        side = max(width, height)
        return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2
    return 0.0, 0.0, float(width), float(height)


def to_pixels(box: Box, grid: tuple[int, int], window: tuple[float, float, float, float], size: tuple[int, int]) -> Box:
    """A box of cells as one of pixels, inside the picture of `size` (width, height) and at least a few pixels wide."""
    rows, cols = grid
    wide, high = (window[2] - window[0]) / cols, (window[3] - window[1]) / rows
    edges = (window[0] + box[0] * wide, window[1] + box[1] * high, window[0] + box[2] * wide, window[1] + box[3] * high)
    found = []
    for low, high_edge, limit in ((edges[0], edges[2], size[0]), (edges[1], edges[3], size[1])):
        first = min(max(0, int(low)), limit - 1)
        last = min(limit, max(first + 1, -int(-high_edge // 1)))
        found.append(_grown(first, last, min(SMALLEST_CROP, limit), limit))
    (left, right), (top, bottom) = found
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    return left, top, right, bottom


def zoomed(
    model: Any, processor: Any, text: str, picture: Image, branch: str, tau: float = 0.1, most: int = 2
) -> tuple[Any, list[Box]]:
    """Processor output for a prompt about one picture, with crops of the regions that the question is about behind it.

    Args:
        model: nothing may be applied to it, wrappers and all; afterwards a method may.
        processor: of the model.
        text: the prompt, with the picture's placeholder in it once, as the chat template writes it.
        picture: PIL, RGB.
        branch: the folder that `tokenprune train sd_rpn` wrote.
        tau: threshold of the blurred sigmoid; 1 never finds a region.
        most: how many boxes at most; with more, or none, the prompt stays as it is.

    Returns:
        What the processor made, on the model's device, and the boxes in pixels; without any the inputs are those of the
        prompt as it was.

    Raises:
        ValueError: the text has not exactly one placeholder, or the picture is not one grid of tokens.
    """
    token = getattr(processor, "image_token", None)
    if token is None or text.count(token) != 1:
        raise ValueError(
            f"zoomed takes a prompt with the placeholder of one picture ({token!r}) in it, and this one has "
            f"{text.count(token) if token else 'none'}."
        )
    if not 0 <= tau <= 1:
        raise ValueError(f"tau is a threshold of a probability, from 0 to 1, got {tau!r}.")

    def made(prompt: str, pictures: list[Any]) -> Any:
        packed = processor(text=[prompt], images=[pictures], return_tensors="pt")
        return packed.to(model.device, dtype=model.dtype)

    plain = made(text, [picture])
    logits = region_map(model, plain, branch)
    cells = boxes_of(smoothed(logits) > tau)
    if not 1 <= len(cells) <= most:
        return plain, []
    window = picture_window(processor, picture.size)
    boxes = [to_pixels(box, (logits.shape[0], logits.shape[1]), window, picture.size) for box in cells]
    marked = re.search(rf"(<\|vision_start\|>)?{re.escape(token)}(<\|vision_end\|>)?", text)
    place = marked[0] if marked else token
    return made(text.replace(place, place * (1 + len(boxes))), [picture, *(picture.crop(box) for box in boxes)]), boxes
