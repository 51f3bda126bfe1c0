"""Gives each frame of a video tokens by its squared relevance to the question, and resizes its grid to them (QuoTA).

Paper: "QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension",
https://arxiv.org/abs/2503.08689 (tables read, not the text).
Official code: MAC-AutoML/QuoTA, quota_pipeline.py and core/llava_arch.py (read without a commit).
Licence: none upstream; this file was written from the formulas, no code was copied.

A frame of score p has the share p^2 / sum p^2 of the budget k, n tokens; s = floor(sqrt n), and its P x P grid becomes
(s + 1) x s if that is at most n, else s x s (code). `resize` says how:
- "v1", the default: bilinear, no antialiasing.
- "v2": adaptive average pooling.
- "v3": n evenly spaced tokens of the frame, row by row, unchanged. That they are floor(i (P P - 1) / (n - 1)) is our
  reading.
Merging (v4 and v5 of the code) is not here; "tome" merges frames.

    n_f = k p_f^2 / sum_f p_f^2,  s = floor(sqrt(n_f))

Scores: hint "frame_scores", `handle.set_hints(frame_scores=[...])`, one list a video; `tokenprune.frame_scores` asks a
model for them as the paper does. What stands for a picture is not looked at (None will do): a picture is one frame of
weight 1, its crops share by size. `scores="uniform"` needs no hint and gives every frame the same.

The budget is never exceeded (a budget that one token and its row end exceed still keeps one token). `total="nearest"`
(ours) spends what rounding down leaves: again and again the frame furthest below its share takes its next larger grid,
as long as one can be afforded. So v3 keeps exactly k, v1 and v2 as near to it as whole grids allow.
`total="official"` leaves the rest unspent. A frame whose n is 0 is dropped, unless `floor=1`.

Deviations:
- A frame never grows: kept tokens stand at places of its own tokens. What a frame cannot use is dealt to the others in
  proportion until nothing changes (water filling); `cap=False` leaves it unspent. The code's v1 enlarges; its others
  redistribute once, by order.
- Grids that are not square take the raster of at most n cells that keeps their shape, see `fit_grid`.
- Scores whose squares sum to less than 1e-12 weigh all frames alike; the code divides by zero.
- Row-end tokens leave with the first cut here, so the length is that of the grids. With `count_newlines` the budget
  pays for the end of each row all the same, h (w + 1) tokens a frame as LLaVA-Video would have: that much less is kept.
- A model may make one frame of several (Qwen: of two): scores are then averaged over as many.
- How many frames are sampled (96 + 64 an hour) is up to who reads the video.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, grid_places, refuse_nan
from tokenprune.interfaces.view import View
from tokenprune.interfaces.visual import Raster
from tokenprune.methods._frame_quota import Grid, Rung, deal_grids, ladder, squares
from tokenprune.registry import near, register_method

RESIZES = ("v1", "v2", "v3")
SCORES = ("hint", "uniform")
TOTALS = ("nearest", "official")
HINT = "frame_scores"


@register_method("quota")
@dataclass
class Quota(Pruner):
    """Resizes the frames of a video `[M, F P, D]` to at most k tokens together.

    Attributes:
        resize: "v1" (bilinear), "v2" (average pooling) or "v3" (evenly spaced tokens).
        scores: "hint" or "uniform".
        total: "nearest" or "official".
        cap: whether what a frame cannot use goes to the others.
        floor: 1 leaves every frame a token, as far as the budget goes, those with the highest scores first.
        count_newlines: whether the budget pays for row ends.
    """

    default_scope: ClassVar[str] = "visual"
    needs_grid: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    says_sizes: ClassVar[bool] = False
    text_aware: ClassVar[bool] = True
    published: ClassVar[str] = "arXiv 2503.08689, MAC-AutoML/QuoTA"
    reproduces: ClassVar[str] = (
        "LLaVA-Video-7B at 12544 tokens: Video-MME without subtitles 65.9 (63.3 without it), VNBench 64.7 (54.4)"
    )
    hint_sources: ClassVar[Mapping[str, str]] = {
        HINT: "tokenprune.frame_scores(model, processor, frames, question) asks a model for those of a video, None "
        'will do for a picture, and scores="uniform" needs none.'
    }

    resize: str = "v1"
    scores: str = "hint"
    total: str = "nearest"
    cap: bool = True
    floor: int = 0
    count_newlines: bool = False

    def __post_init__(self) -> None:
        if self.scope == "raster":
            raise ValueError("quota deals a budget out to the frames of a video, so its scope is 'visual'.")
        if self.scope == "visual":  # what it does anyway, though it works on grids
            self.scope = None
        super().__post_init__()
        for name, known in (("resize", RESIZES), ("scores", SCORES), ("total", TOTALS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.{near(value, known)}")
        for name in ("cap", "count_newlines"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        if isinstance(self.floor, bool) or self.floor not in (0, 1):
            raise ValueError(f"floor must be 0 or 1 token a frame, got {self.floor!r}.")
        if self.count_newlines and self.resize == "v3":
            raise ValueError('count_newlines pays for the ends of rows, and resize="v3" makes none.')

    @property
    def needed_hints(self) -> tuple[str, ...]:
        return (HINT,) if self.scores == "hint" else ()

    def weights(self, rasters: Sequence[Raster], given: Any) -> list[int]:
        """Of each raster, as whole numbers to any scale."""
        if not any(raster.kind == "frame" for raster in rasters):
            return [raster.num_tokens for raster in rasters]
        if self.scores == "uniform":
            return [1] * len(rasters)
        return squares(per_frame(given, len(rasters)))

    def grids(self, rasters: Sequence[Raster], budget: int, given: Any) -> list[Rung | None]:
        """What each raster becomes, None where it is dropped."""
        ladders = [ladder(raster.grid, self.count_newlines, self.resize == "v3") for raster in rasters]
        return deal_grids(
            self.weights(rasters, given), budget, ladders, bool(self.floor), self.cap, self.total == "nearest"
        )

    def select(self, view: View) -> Selection:
        refuse_nan(view.features)
        given = view.hints.get(HINT, [None] * view.num_images)
        dealt = [self.grids(view.rasters, view.budget, one) for one in given]
        rows, merged = [], []
        for frames in dealt:
            row: list[int] = []
            used = 0
            for raster, rung in zip(view.rasters, frames):
                if rung is not None:
                    row += [raster.start + place for place in self.places(raster.grid, rung[2])]
                    used += self._used(raster.grid, rung[2]) - rung[1]
            rows.append(row)
            merged.append(used)
        counts = [len(row) for row in rows]
        most, device = max(counts), view.features.device
        indices = torch.tensor([row + [0] * (most - len(row)) for row in rows], device=device)
        return Selection(
            indices,
            None if self.resize == "v3" else self._resized(view, dealt, most),
            counts=None if min(counts) == most else counts,
            merged=torch.tensor(merged, device=device),
        )

    def places(self, grid: Grid, small: Grid) -> list[int]:
        """Where the tokens of the smaller grid stand in the frame."""
        if self.resize != "v3":
            return grid_places(grid, small)
        count, cells = small[1], grid[0] * grid[1]
        return [place * (cells - 1) // max(1, count - 1) for place in range(count)]

    def _resized(self, view: View, dealt: list[list[Rung | None]], most: int) -> Tensor:
        """`[M, most, D]`: frames that have one shape and become one shape are resized together."""
        features = view.features
        out = features.new_zeros(view.num_images, most, features.shape[2])
        groups: dict[tuple[Grid, Grid], list[tuple[int, int, int]]] = {}
        for image, frames in enumerate(dealt):
            begin = 0
            for raster, rung in zip(view.rasters, frames):
                if rung is not None:
                    groups.setdefault((raster.grid, rung[2]), []).append((image, raster.start, begin))
                    begin += rung[1]
        for (grid, small), members in groups.items():
            cells = grid[0] * grid[1]
            whole = torch.stack([features[image, start : start + cells] for image, start, _ in members])
            if small != grid:
                raster = whole.float().unflatten(1, grid).permute(0, 3, 1, 2)  # [m, D, rows, cols]
                if self.resize == "v1":
                    raster = interpolate(raster, small, mode="bilinear", align_corners=False)
                else:
                    raster = adaptive_avg_pool2d(raster, small)
                whole = raster.flatten(2).transpose(1, 2).to(features.dtype)
            for part, (image, _, begin) in zip(whole, members):
                out[image, begin : begin + len(part)] = part
        return out

    def _used(self, grid: Grid, small: Grid) -> int:
        """How many tokens of the frame have a part in the smaller grid."""
        if self.resize == "v3":
            return small[0] * small[1]
        if self.resize == "v2":
            return grid[0] * grid[1]
        return math.prod(_touched(long, short) for long, short in zip(grid, small))


def _touched(long: int, short: int) -> int:
    """How many of `long` places bilinear interpolation to `short` reads."""
    found = set()
    for cell in range(short):
        # the place is (2 cell + 1) long / (2 short) - 1 / 2, between two whole ones
        place, rest = divmod((2 * cell + 1) * long - short, 2 * short)
        found |= {place, min(place + 1, long - 1)} if rest else {place}
    return len(found)


def per_frame(given: Any, frames: int) -> list[float]:
    """Scores of so many frames from those of a video's pictures, averaged over neighbours where there are more.

    Raises:
        ValueError: their number is no multiple of the frames, or one is negative or no number.
    """
    try:
        values = [float(value) for value in given]
    except TypeError:
        raise ValueError(
            f"frame_scores must give a video a list of one score for each of its {frames} frames, got {given!r}."
        ) from None
    if not values or len(values) % frames:
        raise ValueError(
            f"frame_scores gave a video {len(values)} scores, and it has {frames} frames: give one for each of its "
            "frames, or for each picture that they were made of."
        )
    wrong = [value for value in values if not 0 <= value < math.inf]
    if wrong:
        raise ValueError(f"frame_scores must be numbers from 0 on, such as probabilities, got {wrong[0]!r}.")
    group = len(values) // frames
    return [sum(values[i * group : (i + 1) * group]) / group for i in range(frames)]
