"""What was recorded of images while the vision tower ran, and how features find it again.

`generate` may run the tower before the forward pass and repeat its features for beams, so a recording is tied to the
feature tensors themselves rather than to a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.interfaces.signals import Signal
from tokenprune.interfaces.visual import TowerWork, Visual
from tokenprune.state.device_timer import DeviceTimer

_TAG = "_tokenprune_source"
_WIDTH = 1024  # of the table that pixels are laid out in to be added up


@dataclass
class KeptBeforeProjector:
    """Which tokens of one visual a cut before the projector left.

    Attributes:
        tokens: `[k]` int64, increasing, among the tokens of the visual.
        count: k, known on the host.
        carry: name -> `[k]`, see `Selection.carry`.
        sizes: `[k]` fp32, how many tokens each weighs as in attention; None where each stands for itself.
    """

    tokens: Tensor
    count: int
    carry: dict[str, Tensor]
    sizes: Tensor | None = None


class Recording:
    """One run of the vision tower over the visuals of one kind.

    Attributes:
        visuals: what the tower was given, in its order.
        signals: for each request, one `[cells]` fp32 tensor per visual, in the order of the visual's crops;
            `[cells, C]` for those that are vectors.
        kept: what a cut before the projector left of each visual; None where nothing was cut.
        shrunk: (rows, cols) of each visual that the tower really worked on, if a method shrank the pictures.
        pixels: of each visual, see `Adapter.pixel_rows`.
        features: of each visual, see `Adapter.feature_rows`; only until they were held against a prompt.
        patches: patches of each picture in each block from `first_short` on, where a method cut inside the tower.
        merged: `[]` each, how many tokens went into kept ones, by picture and stage.
        selection_flops: matrix products of signals and of methods while the tower ran.
        timer: time of signals and selections while the tower ran.
    """

    def __init__(self, visuals: Sequence[Visual], pixels: Tensor, pixel_rows: Sequence[Tensor]) -> None:
        self.signals: dict[Signal, list[Tensor]] = {}
        self.shrunk: list[tuple[int, int]] | None = None
        self.patches: list[list[int]] = []
        self.first_short = 0
        self.selection_flops = 0
        self.merged: list[Tensor] = []
        self.cuts: list[tuple[int, tuple[Tensor | None, ...]]] = []
        self.left: list[int] = []  # cells of each picture behind the tower, where a method cut inside it
        self.device = pixels.device
        self.timer = DeviceTimer()
        self.features: list[Tensor] = []
        self.lay_out(visuals, pixel_rows)

    def lay_out(self, visuals: Sequence[Visual], pixel_rows: Sequence[Tensor]) -> None:
        """Say what the tower was given, where that is known behind it only."""
        self.visuals = list(visuals)
        self.kept: list[KeptBeforeProjector | None] = [None] * len(self.visuals)
        self.pixels = list(pixel_rows)

    def work(self) -> TowerWork:
        """What the tower was given."""
        grids = tuple(grid for visual in self.visuals for grid in visual.tower_grids)
        plain: tuple[tuple[int, int], ...] = ()
        if self.shrunk is not None:
            plain = grids
            grids = tuple(small for small, visual in zip(self.shrunk, self.visuals) for _ in visual.rasters)
        blocks = tuple(tuple(counts) for counts in self.patches)
        whole = sum(
            sum(rows * cols for rows, cols in visual.tower_grids) if visual.projected is None else visual.projected
            for visual in self.visuals
        )
        left = sum(rows * cols for rows, cols in grids) if self.shrunk is not None else whole
        return TowerWork(
            grids, blocks, self.first_short, sum(self.left) if self.left else left, whole, plain, tuple(self.cuts)
        )

    def pixel_key(self, row: int) -> Tensor:
        """`[]` int64: a sum over the bits of a visual's pixels, the same in any batch and on any device."""
        bits = self.pixels[row].detach().float().contiguous().view(torch.int32).flatten().to(torch.int64)
        # weights by place (1, 2, 3, ...), so that a shifted picture has another key; int64 overflow wraps the same way
        # everywhere. They are applied to sums of rows and columns: pixels are many, and so are read twice and no more
        whole = len(bits) // _WIDTH * _WIDTH
        table = bits[:whole].view(-1, _WIDTH)
        column, first, tail = (
            torch.arange(*ends, device=bits.device)
            for ends in ((1, _WIDTH + 1), (0, whole, _WIDTH), (whole + 1, len(bits) + 1))
        )
        total = (table.sum(0) * column).sum() + (table.sum(1) * first).sum() + (bits[whole:] * tail).sum()
        return total * 2654435761

    def signal(self, signal: Signal, row: int) -> Tensor:
        """`[N]` fp32, or `[N, C]`: a signal of one visual, by its own tokens."""
        cells, visual = self.signals[signal][row], self.visuals[row]
        if visual.resample is not None:
            return visual.resample(cells)
        return cells if visual.sources is None else cells[visual.sources.to(cells.device)]


def tag(output: Any, recording: Recording) -> None:
    """Tie the features in the output of a features call to `recording`."""
    features = getattr(output, "pooler_output", None)
    if isinstance(features, Tensor):
        # on both: generation makes a new tensor for beams, and offloading a new output
        for holder in (output, features):
            setattr(holder, _TAG, (recording, features))
    elif features is not None:
        for row, tensor in enumerate(features):
            setattr(tensor, _TAG, (recording, row))


def sources_of(output: Any) -> list[tuple[Recording, int]] | None:
    """The recording and row that each visual's features in `output` came from; None if they are not known.

    Where features are one tensor for all visuals, generation may have repeated its rows for beams: they are then known
    again by what they hold.
    """
    features = output.pooler_output
    if not isinstance(features, Tensor):
        sources = [getattr(tensor, _TAG, None) for tensor in features]
        return None if any(item is None for item in sources) else sources  # type: ignore[return-value]
    recording, original = getattr(output, _TAG, None) or getattr(features, _TAG, (None, features))
    if recording is None or original.shape[1:] != features.shape[1:]:
        return None
    if original is features:
        return [(recording, row) for row in range(len(original))]
    # one tensor at a time, so that no [beams, pictures, ...] is formed; one read for all
    same = torch.stack([(tensor == original).flatten(1).all(1) for tensor in features]).tolist()
    return [(recording, row.index(True)) for row in same] if all(map(any, same)) else None
