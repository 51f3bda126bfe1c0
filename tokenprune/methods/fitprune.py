"""Lets a few visual tokens go in every decoder layer, as many as a calibrated schedule says (FitPrune).

Paper: "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models", Ye et al.,
AAAI 2025, https://arxiv.org/abs/2409.10197.
Official code: ywh187/FitPrune at d28e418.
Licence: Apache-2.0 upstream; this file was written from the formulas, no code and no schedule was copied.

Behind each layer the N_l visual tokens with the lowest score leave: score = self x cross, of attention in that layer
with the largest value over heads (code); self is the mean over the visual's tokens of what they pay a token, cross the
sum over the text behind. Position ids are kept (code). The schedule, N_l for each layer, is found once from a few
samples, see `tokenprune.evals.tuning.deletions`; the official ones for LLaVA-1.5 are not here.

    s_j = self_j cross_j
    self_j = mean_{i in V} max_h A_h[i, j],  cross_j = sum_{t in T} max_h A_h[t, j]

Budget (our choice): `keep` is how many tokens are left before the last layer, and `average=` solves for the mean over
the layers, as with every method. The file has one schedule for each share of FLOPs that was asked for. Two whose ends
lie on both sides of `keep` are interpolated; below the lowest and above the highest, or with one schedule alone,
deletions are scaled in proportion, so that exactly `keep` are left. At the number that a schedule itself ends with it
is what was calibrated. N of other pictures and decoders of another depth take it in proportion.

Deviations, and our choices:
- The official code cuts between a layer's attention and its MLP. Here tokens leave before the next layer, by the same
  attention, so that layer's MLP still runs on all of them; what leaves behind the last layer changes nothing and is no
  cut.
- Families that cannot be cut so early make the first deletions at their lowest layer, together.
- Each image or video has its own budget and rows; the text is that behind the prompt's last visual token, or the last
  token where none follows. The official code has one image at a fixed place.
- fp32; rows are formed in blocks, never a whole map. Ties go to the lower raster index.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths, Pruner, Stage
from tokenprune.interfaces.signals import TEXT_MAX_ATTENTION, VISUAL_MAX_ATTENTION, Signal, TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.registry import register_method

COMMAND = "tokenprune calibrate fitprune --model MODEL --data DATA --output FILE.json"
FILE = "schedule.json"

Curve = tuple[float, ...]
"""For each decoder layer the share of the visual tokens that enter it; the first is 1, none is above the one before."""


def curve_of(deletions: Sequence[float], num_tokens: float) -> Curve:
    """From how many of N leave behind each layer, the last of which is of no account."""
    return (1.0, *(1 - gone / num_tokens for gone in accumulate(deletions[:-1])))


def at_depth(curve: Curve, layers: int) -> Curve:
    """The curve of a decoder of so many layers, read in proportion."""
    if len(curve) == layers:
        return curve
    found = []
    for layer in range(layers):
        place = layer * (len(curve) - 1) / max(layers - 1, 1)
        low = min(math.floor(place), len(curve) - 2)
        found.append(curve[low] + (place - low) * (curve[low + 1] - curve[low]))
    return tuple(found)


def ordered(curves: Sequence[Curve]) -> tuple[Curve, ...]:
    """Those that can be interpolated, by their ends: from one to the next nothing falls in the mean and the end rises.
    Where two end alike the one that keeps fewer on the way counts."""
    found: list[Curve] = []
    for curve in sorted(curves, key=lambda curve: (curve[-1], sum(curve))):
        if not found or (curve[-1] > found[-1][-1] and sum(curve) >= sum(found[-1])):
            found.append(curve)
    return tuple(found)


def shares(curves: Sequence[Curve], last: float) -> Curve:
    """The curve that ends at `last`, in (0, 1], from those of a file in the order of `ordered`."""
    low = max((curve for curve in curves if curve[-1] <= last), key=lambda curve: curve[-1], default=None)
    high = min((curve for curve in curves if curve[-1] > last), key=lambda curve: curve[-1], default=None)
    if low is not None and high is not None:
        part = (last - low[-1]) / (high[-1] - low[-1])
        return tuple(a + part * (b - a) for a, b in zip(low, high))
    nearest = low or high
    if nearest is None:
        raise ValueError("A curve is made of at least one schedule.")
    return tuple(1 - (1 - share) * (1 - last) / (1 - nearest[-1]) for share in nearest)


class CurveBudget(Budget):
    """What enters decoder layer `layer` of N tokens of which `keep` enter the last."""

    def __init__(self, keep: int | float, curves: Sequence[Curve], layer: int) -> None:
        super().__init__(keep)
        self._curves, self._layer = curves, layer

    def tokens(self, num_tokens: int) -> int:
        last = super().tokens(num_tokens)
        share = shares(self._curves, last / num_tokens)[self._layer]
        return min(num_tokens, max(last, math.floor(share * num_tokens + 0.5)))


def schedule_file(schedule: str) -> Path:
    """The file of a schedule: a path, or the name of a model for which one ships with the package.

    Raises:
        ValueError: there is none; the message says how to make one.
    """
    import tokenprune

    name = f"fitprune_{schedule.replace('-', '_')}"
    shipped = [Path(place) / "configs" / "learned" / name / FILE for place in tokenprune.__path__]
    for file in (Path(os.path.expanduser(schedule)), *shipped):
        if os.path.isfile(file):
            return file
    raise ValueError(
        f"schedule={schedule!r} is neither a file nor a model whose schedule ships with the package. Make one with "
        f"`{COMMAND}`."
    )


@functools.lru_cache(maxsize=16)
def _read(file: Path, changed: float) -> tuple[Curve, ...]:
    """Curves of a file; `changed` tells one that was written anew."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        found = [(check_deletions(one["deletions"]), float(said["tokens"])) for one in said["schedules"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no schedules of fitprune ({error}). Make one with `{COMMAND}`.") from None
    return ordered([curve_of(deletions, tokens) for deletions, tokens in found])


def check_deletions(deletions: Any) -> tuple[float, ...]:
    """How many tokens leave behind each layer.

    Raises:
        ValueError: no numbers, fewer than two, or none that leave before the last layer.
    """
    if not isinstance(deletions, Sequence) or any(isinstance(n, bool) or not isinstance(n, Real) for n in deletions):
        raise ValueError(f"a schedule is a list with a number of tokens for each decoder layer, got {deletions!r}.")
    found = tuple(float(n) for n in deletions)
    if not all(math.isfinite(n) and n >= 0 for n in found) or not sum(found[:-1]) > 0:
        raise ValueError(
            f"a schedule has numbers from 0 on, and some token must leave before the last layer, got {deletions!r}."
        )
    return found


@register_method("fitprune")
@dataclass
class FitPrune(Pruner):
    """Ranks the visual tokens `[M, N]` in every decoder layer by what both the picture and the text attend to.

    Attributes:
        schedule: the file that `tokenprune calibrate fitprune` wrote, the name of a model whose schedule ships with the
            package ("pocket-llava", "pocket-qwen"), or a list with the number of tokens that leave behind each decoder
            layer, of which the proportions count. There is no default: a schedule is found for one model.
    """

    site: ClassVar[str] = "layer"
    default_scope: ClassVar[str] = "visual"
    published_positions: ClassVar[str] = "keep"
    text_aware: ClassVar[bool] = True
    published: ClassVar[str] = "arXiv 2409.10197, ywh187/FitPrune"
    reproduces: ClassVar[str] = ""

    schedule: str | list[float] | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule is None:
            raise ValueError(
                "fitprune needs a schedule, how many tokens leave behind each layer of this model: make one with "
                f'`{COMMAND}` and write schedule="FILE.json"; those of pocket-llava and pocket-qwen ship with the '
                "package."
            )
        self.curves()

    @property
    def files(self) -> tuple[Path, ...]:
        return (schedule_file(str(self.schedule)),) if isinstance(self.schedule, (str, Path)) else ()

    def curves(self) -> tuple[Curve, ...]:
        """Those of the schedule, by their ends."""
        for file in self.files:
            return _read(file, file.stat().st_mtime)
        deletions = check_deletions(self.schedule)
        return (curve_of(deletions, sum(deletions) + 1),)

    def stages(self, budget: Budget, depths: ModelDepths) -> tuple[Stage, ...]:
        curves = ordered([at_depth(curve, depths.decoder) for curve in self.curves()])
        first = min(max(depths.first_cut, 1), depths.decoder - 1)
        fall = [any(curve[layer] < curve[layer - 1] for curve in curves) for layer in range(1, depths.decoder)]
        layers = [layer for layer, falls in enumerate(fall, start=1) if falls and layer > first]
        layers = [first, *layers] if any(fall[:first]) else layers
        return tuple(Stage(f"layer:{layer}", self, CurveBudget(budget.keep, curves, layer)) for layer in layers)

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        if place != "layer":
            raise ValueError(
                f"fitprune ranks by attention inside the decoder, so it acts at 'layer:K', not at {place!r}."
            )
        return (Signal(VISUAL_MAX_ATTENTION, depth - 1), Signal(TEXT_MAX_ATTENTION, depth - 1))

    def score(self, view: View) -> Tensor:
        own, text = (view.signal(name, view.depth - 1) for name in (VISUAL_MAX_ATTENTION, TEXT_MAX_ATTENTION))
        return own * text
