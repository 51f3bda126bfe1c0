"""Where the visual tokens of a batch of prompts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """One image of one prompt.

    Attributes:
        sample: row of the batch.
        image: place among the images of that prompt, from 0.
        start: index of its first visual token in the row, padding counted.
        grid: (rows, cols) of its visual tokens in raster order.
    """

    sample: int
    image: int
    start: int
    grid: tuple[int, int]

    @property
    def num_tokens(self) -> int:
        """N, visual tokens of this image."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Layout:
    """The images of a batch of prompts, in the order in which the vision tower saw them.

    Attributes:
        spans: one entry an image, row by row and left to right.
        batch_size: rows.
        length: tokens a row, padding counted.
    """

    spans: tuple[Span, ...]
    batch_size: int
    length: int

    @property
    def visual_tokens(self) -> int:
        """Visual tokens in the whole batch."""
        return sum(span.num_tokens for span in self.spans)

    def groups(self) -> dict[tuple[int, int], list[int]]:
        """Indices into `spans` by grid: images of one shape are handed to a method together."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, span in enumerate(self.spans):
            groups.setdefault(span.grid, []).append(index)
        return groups


def build_layout(visual: Tensor, grids: Sequence[tuple[int, int]]) -> Layout:
    """Lay the images of `grids` over the visual positions.

    Args:
        visual: `[B, S]` bool on the CPU, True at visual positions.
        grids: (rows, cols) of each image of the batch, in tower order.

    Raises:
        ValueError: the positions and the images do not fit together.
    """
    batch_size, length = visual.shape
    total, expected = int(visual.sum()), sum(rows * cols for rows, cols in grids)
    if total != expected:
        raise ValueError(
            f"The prompts hold {total} image tokens, but the {len(grids)} image(s) passed with them make {expected} "
            "visual tokens. Build the inputs with the model's own processor, images and text in one call."
        )
    rows, places = torch.nonzero(visual, as_tuple=True)
    rows_list, places_list = rows.tolist(), places.tolist()
    spans: list[Span] = []
    cursor = 0
    for grid in grids:
        count = grid[0] * grid[1]
        first, last = cursor, cursor + count - 1
        if rows_list[first] != rows_list[last] or places_list[last] - places_list[first] != count - 1:
            raise ValueError(
                f"Image {len(spans)} should be {count} image tokens in a row within one prompt, but its tokens are "
                "split. Build the inputs with the model's own processor."
            )
        sample = rows_list[first]
        image = spans[-1].image + 1 if spans and spans[-1].sample == sample else 0
        spans.append(Span(sample, image, places_list[first], grid))
        cursor += count
    return Layout(tuple(spans), batch_size, length)
