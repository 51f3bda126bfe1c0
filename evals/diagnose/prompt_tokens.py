"""What each token of a batch of prompts is: first, template, question, picture; and which cells are asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.engine.prompt_reader import prompt_visuals
from tokenprune.evals.models.load import LoadedModel
from tokenprune.evals.tasks.task import Sample
from tokenprune.methods.oracle import coverage

GROUPS = ("first", "template", "question", "image", "answer")
"""Kinds of tokens, by number from 1; 0 is padding. "answer" are generated tokens."""
FIRST, TEMPLATE, QUESTION, IMAGE, ANSWER = range(1, 6)
_TOUCH = 1e-4  # of a cell: a box that ends on its border does not touch it, even if rounded


@dataclass(frozen=True)
class PromptTokens:
    """A batch of prompts as they were before any cut.

    Attributes:
        groups: `[B, S]` int64, see `GROUPS`.
        region: `[B, S]` bool, cells that a box of the sample touches.
        boxed: `[B]` bool, samples whose boxes lie over cells that are known.
    """

    groups: Tensor
    region: Tensor
    boxed: Tensor

    @property
    def visual(self) -> Tensor:
        """`[B, S]` bool."""
        return self.groups == IMAGE


def read_tokens(loaded: LoadedModel, samples: Sequence[Sample], inputs: dict[str, Any]) -> PromptTokens:
    """Groups and regions of a batch, padded on the left.

    A token of the template is one that the same prompt with an empty question has too, at its beginning or its end: our
    choice. The first token is that of each row, whatever it is.

    Raises:
        ValueError: padding on the right.
    """
    ids = inputs["input_ids"]
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(ids, dtype=torch.bool)
    if not bool(real[:, -1].all()):
        raise ValueError("Diagnostics read prompts that are padded on the left, and this batch is padded on the right.")
    visual = torch.zeros_like(real)
    for number in loaded.adapter.placeholder_ids.values():
        visual |= ids == number
    groups = torch.where(visual, IMAGE, TEMPLATE) * real
    for row, sample in enumerate(samples):
        plain = loaded.inputs([""], [sample.image])["input_ids"][0].tolist()
        start, stop = own_part(ids[row][real[row]].tolist(), plain)
        places = real[row].nonzero()[:, 0]
        own = places[start:stop]
        groups[row, own[~visual[row, own]]] = QUESTION
        groups[row, places[0]] = FIRST
    region, boxed = _regions(loaded, samples, inputs, visual)
    return PromptTokens(groups, region, boxed)


def own_part(ids: Sequence[int], plain: Sequence[int]) -> tuple[int, int]:
    """Where what `plain` has not stands in `ids`: behind their longest common beginning, before their longest common
    end."""
    most = min(len(ids), len(plain))
    start = next((i for i in range(most) if ids[i] != plain[i]), most)
    end = next((i for i in range(most - start) if ids[-1 - i] != plain[-1 - i]), most - start)
    return start, len(ids) - end


def _regions(
    loaded: LoadedModel, samples: Sequence[Sample], inputs: dict[str, Any], visual: Tensor
) -> tuple[Tensor, Tensor]:
    """`[B, S]` and `[B]` bool. Cells are known where all rasters of a prompt are whole pictures or frames."""
    region = torch.zeros_like(visual)
    boxed = torch.zeros(visual.shape[0], dtype=torch.bool, device=visual.device)
    for row, sample in enumerate(samples):
        if not sample.boxes or len(sample.visuals) != 1:
            continue
        one = dict(loaded.inputs([sample.question], [sample.image]))
        kind = "video" if isinstance(sample.image, list) and "video" in loaded.adapter.features else "image"
        (shown, *more) = prompt_visuals(loaded.adapter, kind, one)
        cells = [coverage(sample.boxes, raster.grid) > _TOUCH for raster in shown.rasters]
        placed = all(raster.kind in ("image", "frame") for raster in shown.rasters)
        places = visual[row].nonzero()[:, 0]
        if more or not placed or shown.num_tokens != len(places):
            continue
        region[row, places] = torch.cat(cells).to(region.device)
        boxed[row] = True
    return region, boxed
