"""Finds how many visual tokens may leave behind each decoder layer: the schedules of the method fitprune.

FitPrune (arXiv 2409.10197): what leaves takes at most a share alpha of the attention mass of a layer, both of what the
visual's own tokens pay (self) and of what the text pays (cross). Layer by layer, the tokens that are left are sorted by
either; the longest prefixes within alpha are taken, what is in both leaves, and N_l is the mean over the samples,
rounded down. It ends at the layer where the forecast FLOPs are within (1 - R) of the whole. Alpha is the smallest, to
0.01, that gets there, by bisection.

Our reading, where the note on the code leaves it open: a layer's mass is that of all tokens, and what left before
counts as removed; at least one token stays; FLOPs are of the method as it runs here, where tokens leave behind a whole
layer. Samples of several sizes count by share of their tokens. No full attention map is made: signals are read from the
running model, all tokens of which stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.api import applied
from tokenprune.evals.models.load import LoadedModel
from tokenprune.evals.tuning.numbers import finite
from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths, Pruner, Stage
from tokenprune.interfaces.selection import Selection
from tokenprune.interfaces.signals import TEXT_MAX_ATTENTION, VISUAL_MAX_ATTENTION, Signal, TowerInfo
from tokenprune.interfaces.view import View

STEP = 0.01  # of alpha


@dataclass
class Mass:
    """Attention that the tokens of one visual get, by layer.

    Attributes:
        own, text: `[layers, N]` fp64, zeros where a layer was not read.
    """

    own: Tensor
    text: Tensor

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.own.shape[1]


class _Recorder(Pruner):
    """Keeps all and notes what fitprune would rank by, behind each layer."""

    site: ClassVar[str] = "layer"
    name: ClassVar[str] = "fitprune_calibration"
    default_scope: ClassVar[str] = "visual"
    published_positions: ClassVar[str] = "keep"
    adaptive: ClassVar[bool] = True
    seen: ClassVar[dict[int, list[tuple[Tensor, Tensor]]]] = {}

    def stages(self, budget: Budget, depths: ModelDepths) -> tuple[Stage, ...]:
        return tuple(Stage(f"layer:{k}", self, budget) for k in range(max(depths.first_cut, 1), depths.decoder))

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        return (Signal(VISUAL_MAX_ATTENTION, depth - 1), Signal(TEXT_MAX_ATTENTION, depth - 1))

    def select(self, view: View) -> Selection:
        own, text = (view.signal(name, view.depth - 1) for name in (VISUAL_MAX_ATTENTION, TEXT_MAX_ATTENTION))
        for mass in (own, text):
            finite(mass)
        self.seen.setdefault(view.depth - 1, []).extend(zip(own.double().cpu(), text.double().cpu()))
        at = torch.arange(view.num_tokens, device=view.features.device)
        return Selection(at.expand(view.num_images, -1))


@torch.no_grad()
def masses_of(model: Any, inputs: Sequence[Any], layers: int, say: Callable[[str], None]) -> list[Mass]:
    """What every visual of some prompts gets, by layer of the unpruned model."""
    found = []
    recorder = _Recorder()
    recorder.seen.clear()
    with applied(model, recorder, keep=1.0):
        for number, batch in enumerate(inputs):
            model(**batch, use_cache=True)
            by_layer = dict(recorder.seen)
            recorder.seen.clear()
            for visual in range(len(next(iter(by_layer.values()), []))):
                count = next(iter(by_layer.values()))[visual][0].shape[0]
                own, text = torch.zeros(2, layers, count, dtype=torch.float64)
                for layer, rows in by_layer.items():
                    own[layer], text[layer] = rows[visual]
                found.append(Mass(own, text))
            if (number + 1) % 16 == 0:
                say(f"{number + 1} of {len(inputs)} samples read")
    return found


@dataclass(frozen=True)
class Widths:
    """D, M and L: of the decoder's states and of its MLP, and how many layers it has."""

    hidden: int
    mlp: int
    layers: int

    def flops(self, counts: Sequence[float]) -> float:
        """4nd^2 + 2n^2d + 3ndm of the visual tokens `n` that enter each layer."""
        d, m = self.hidden, self.mlp
        return sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in counts)


def may_leave(mass: Tensor, there: Tensor, alpha: float) -> Tensor:
    """`[N]` bool: the tokens with the least mass, as many as go without taking more than alpha of all of it; what is
    not there counts as gone.

    Args:
        mass: `[N]` fp64.
        there: `[N]` bool.
    """
    room = alpha * mass.sum() - mass[~there].sum()
    order = torch.where(there, mass, torch.inf).argsort(stable=True)[: int(there.sum())]
    fits = mass[order].cumsum(0) <= room + 1e-12 * mass.sum()
    return torch.zeros_like(there).index_fill(0, order[fits], True)


def deletions_at(alpha: float, samples: Sequence[Mass], widths: Widths, ratio: float) -> tuple[list[int], bool]:
    """N_l of each layer, and whether FLOPs come within 1 - ratio of the whole."""
    tokens = nominal(samples)
    target = (1 - ratio) * widths.flops([tokens] * widths.layers)
    there = [torch.ones(one.num_tokens, dtype=torch.bool) for one in samples]
    counts, deletions = [tokens], [0] * widths.layers
    for layer in range(widths.layers - 1):
        gone = 0.0
        for one, left in zip(samples, there):
            leaves = may_leave(one.own[layer], left, alpha) & may_leave(one.text[layer], left, alpha)
            # a layer that was not read lets none go: zeros say nothing
            leaves &= bool(one.own[layer].sum() > 0)
            gone += int(leaves.sum()) / one.num_tokens
            left &= ~leaves
        deletions[layer] = min(math.floor(tokens * gone / len(samples) + 1e-9), counts[-1] - 1)
        counts.append(counts[-1] - deletions[layer])
        if widths.flops([*counts, *counts[-1:] * (widths.layers - len(counts))]) <= target:
            return deletions, True
    return deletions, False


def nominal(samples: Sequence[Mass]) -> int:
    """Mean number of tokens, rounded."""
    return round(sum(one.num_tokens for one in samples) / len(samples))


def schedule_for(ratio: float, samples: Sequence[Mass], widths: Widths) -> dict[str, Any]:
    """Bisection for one ratio.

    Raises:
        ValueError: FLOPs cannot fall so far.
    """
    low, high = 0.0, 1.0
    deletions, reached = deletions_at(high, samples, widths, ratio)
    if not reached:
        raise ValueError(f"The visual tokens' FLOPs cannot fall by {ratio:g} on this model. Ask for a lower --ratio.")
    while high - low > STEP + 1e-9:
        middle = (low + high) / 2
        found, reached = deletions_at(middle, samples, widths, ratio)
        if reached:
            high, deletions = middle, found
        else:
            low = middle
    tokens = nominal(samples)
    counts = [tokens - sum(deletions[:layer]) for layer in range(widths.layers)]
    return {
        "ratio": ratio,
        "alpha": round(high, 6),
        "flops": round(1 - widths.flops(counts) / widths.flops([tokens] * widths.layers), 4),
        "keep": counts[-1],
        "average": round(sum(counts) / widths.layers, 3),
        "deletions": deletions,
    }


def schedules(
    loaded: LoadedModel, inputs: Sequence[Any], ratios: Sequence[float], say: Callable[[str], None]
) -> dict[str, Any]:
    """What the file of a model holds: a schedule for each share of FLOPs that shall go.

    Raises:
        ValueError: the samples show no picture, the model says NaN, or FLOPs cannot fall so far.
    """
    text = loaded.adapter.language_model.config
    widths = Widths(text.hidden_size, text.intermediate_size, len(loaded.adapter.layers))
    masses = masses_of(loaded.model, inputs, widths.layers, say)
    if not masses:
        raise ValueError("The samples show no picture.")
    found = [schedule_for(ratio, masses, widths) for ratio in sorted(ratios)]
    return {"tokens": nominal(masses), "layers": widths.layers, "schedules": found}


def lines(said: dict[str, Any]) -> list[str]:
    """One for each schedule of a file."""
    return [
        f"ratio {one['ratio']:g}: {one['flops']:.1%} of the visual FLOPs less, {one['average']:g} of "
        f"{said['tokens']} tokens on average, {one['keep']} at the last layer (alpha {one['alpha']:g})"
        for one in said["schedules"]
    ]
