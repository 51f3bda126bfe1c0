"""Views for testing methods without a model: random features, signals, hints and keys for whatever a method asks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.signals import (
    ATTENTION_BY_HEAD,
    FINAL_STATES,
    INSTRUCTION_EMBEDDING,
    TEXT_PIVOT_COSINE,
    TOWER_KEYS,
    TOWER_STATES,
    Signal,
    TowerInfo,
)
from tokenprune.interfaces.view import View
from tokenprune.interfaces.visual import Raster

TOWER = TowerInfo(num_layers=6, feature_layer=4, has_cls=True, num_heads=2, hidden_size=32)


def random_boxes(generator: torch.Generator) -> list[list[float]]:
    """None to three boxes `[x0, y0, x1, y1]` in fractions of the image."""
    boxes = []
    for _ in range(int(torch.randint(4, (), generator=generator))):
        low = torch.rand(2, generator=generator) * 0.8
        high = low + 0.02 + torch.rand(2, generator=generator) * (1 - low - 0.02)
        boxes.append([*low.tolist(), *high.tolist()])
    return boxes


def random_signal(
    signal: Signal, images: int, count: int, tower: TowerInfo, generator: torch.Generator, width: int
) -> Tensor:
    """Rows of a softmax over the tokens and one more column, which is dropped; for vectors multiples of 1/8."""
    if signal.name == INSTRUCTION_EMBEDDING:
        return torch.randint(-16, 17, (images, width), generator=generator) / 8
    if signal.name in (TOWER_STATES, TOWER_KEYS):
        return torch.randint(-16, 17, (images, count, tower.hidden_size), generator=generator) / 8
    if signal.name == FINAL_STATES:
        return torch.randint(-16, 17, (images, count, width), generator=generator) / 8
    if signal.name == TEXT_PIVOT_COSINE:
        return torch.randint(-8, 9, (images, count, int(signal.settings[0])), generator=generator) / 8
    rows = images * tower.num_heads if signal.name == ATTENTION_BY_HEAD else images
    values = (2 * torch.randn(rows, count + 1, generator=generator)).softmax(dim=1)[:, 1:].contiguous()
    if signal.name != ATTENTION_BY_HEAD:
        return values
    return values.view(images, tower.num_heads, count).transpose(1, 2).contiguous()


def make_view(
    method: Pruner,
    grid: tuple[int, int] = (6, 5),
    budget: int = 7,
    images: int = 3,
    width: int = 16,
    seed: int = 0,
    tower: TowerInfo = TOWER,
    features: Tensor | None = None,
    **fields: Any,
) -> View:
    """A view with all that `method` asks for.

    Features are multiples of 1/8 in [-2, 2], so that they are the same numbers in fp32, fp16 and bf16. Signals are rows
    of a softmax over the tokens and one more column, which is dropped. `fields` replace fields of the view.
    """
    generator = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]
    if features is None:
        features = torch.randint(-16, 17, (images, count, width), generator=generator) / 8
    # where a method of a site with a number is tried: the last cut inside the tower, the fourth decoder layer
    depth = {"vision": tower.feature_layer - 1, "layer": 3}.get(method.site, 0)
    signals = {
        signal: random_signal(signal, images, count, tower, generator, width)
        for signal in method.signals_at(tower, method.site, depth)
    }
    known: dict[str, list[Any]] = {"boxes": [random_boxes(generator) for _ in range(images)]}
    known["relevance"] = list(torch.rand(images, count, generator=generator))
    known["frame_scores"] = [[index % 5 / 4, 0.5] for index in range(images)]
    keys = torch.randint(-(2**62), 2**62, (images,), generator=generator)
    view = View(
        features=features,
        rasters=(Raster(grid),),
        budget=budget,
        tower=tower,
        signals=signals,
        hints={name: known[name] for name in method.hints},
        make_keys=lambda: keys,
        site=f"{method.site}:{depth}" if depth else method.site,
    )
    return dataclasses.replace(view, **fields)


def pick(view: View, order: list[int]) -> View:
    """The same view with these images only, in this order."""
    keys = view.keys()[order]
    return dataclasses.replace(
        view,
        features=view.features[order],
        signals={signal: rows[order] for signal, rows in view.signals.items()},
        hints={name: [values[i] for i in order] for name, values in view.hints.items()},
        make_keys=lambda: keys,
    )
