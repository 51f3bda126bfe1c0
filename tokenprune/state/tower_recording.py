"""What was recorded of images while the vision tower ran, and how features find it again.

`generate` may run the tower before the forward pass and repeat its features for beams, so a recording is tied to the
feature tensors themselves rather than to a call.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.interfaces.signals import Signal
from tokenprune.interfaces.visual import TowerWork, Visual, features_in, joined
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
        pixels: of each visual, see `Adapter.pixel_rows`; of a picture that was joined of tiles those of each tile.
        entries: for each tensor of features that the model returned, the visuals that are in it, where they are not one
            each.
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
        self.entries: list[range] | None = None
        self.lay_out(visuals, pixel_rows)

    def lay_out(self, visuals: Sequence[Visual], pixel_rows: Sequence[Tensor]) -> None:
        """Say what the tower was given, where that is known behind it only."""
        self.visuals = list(visuals)
        self.kept: list[KeptBeforeProjector | None] = [None] * len(self.visuals)
        self.pixels: list[Tensor | tuple[Tensor, ...]] = list(pixel_rows)

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
        videos = any(visual.kind == "video" for visual in self.visuals)
        left = sum(self.left) if self.left else left
        return TowerWork(grids, blocks, self.first_short, left, whole, plain, tuple(self.cuts), videos)

    def pixel_key(self, row: int) -> Tensor:
        """`[]` int64: a sum over the bits of a visual's pixels, the same in any batch and on any device."""
        pixels = self.pixels[row]
        if isinstance(pixels, Tensor):
            return self._key(pixels)
        keys = [self._key(tile) * (2 * place + 1) for place, tile in enumerate(pixels)]
        return torch.stack(keys).sum()

    @staticmethod
    def _key(pixels: Tensor) -> Tensor:
        bits = pixels.detach().float().contiguous().view(torch.int32).flatten().to(torch.int64)
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

    def joined(self, pictures: Sequence[tuple[int, ...]]) -> Recording:
        """The same run with visuals that are each made of some of its own, its tiles.

        Args:
            pictures: which visuals make each.
        """
        whole = copy.copy(self)
        whole.visuals = [joined([self.visuals[tile] for tile in tiles]) for tiles in pictures]
        whole.pixels = [tuple(self.pixels[tile] for tile in tiles) for tiles in pictures]  # type: ignore[misc]
        whole.kept = [self._joined_kept(tiles) for tiles in pictures]
        whole.signals = {
            signal: [_cat([values[tile] for tile in tiles]) for tiles in pictures]
            for signal, values in self.signals.items()
        }
        if self.features:
            whole.features = [_cat([self.features[tile] for tile in tiles]) for tiles in pictures]
        return whole

    def _joined_kept(self, tiles: Sequence[int]) -> KeptBeforeProjector | None:
        found = [self.kept[tile] for tile in tiles]
        if len(tiles) == 1 or all(kept is None for kept in found):
            return found[0]
        tokens, sizes, start = [], [], 0
        for tile, kept in zip(tiles, found):
            count = self.visuals[tile].num_tokens
            own = torch.arange(count, device=self.device) if kept is None else kept.tokens.to(self.device)
            weighs = None if kept is None else kept.sizes
            tokens.append(own + start)
            sizes.append(torch.ones(len(own), device=self.device) if weighs is None else weighs.to(self.device))
            start += count
        weighed = any(kept is not None and kept.sizes is not None for kept in found)
        every = torch.cat(tokens)
        return KeptBeforeProjector(every, every.shape[0], {}, torch.cat(sizes) if weighed else None)

    def signal(self, signal: Signal, row: int) -> Tensor:
        """`[N]` fp32, or `[N, C]`: a signal of one visual, by its own tokens.

        Raises:
            ValueError: it was not read when the tower ran.
        """
        if signal not in self.signals:
            raise ValueError(
                f"{signal.name} of layer {signal.layer} was not read when the vision tower ran: the features of this "
                "prompt were computed under another method. Compute them under this one, or give pixels."
            )
        cells, visual = self.signals[signal][row], self.visuals[row]
        if visual.resample is not None:
            return visual.resample(cells)
        return cells if visual.sources is None else cells[visual.sources.to(cells.device)]


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def rows_of(recordings: Sequence[Recording]) -> list[tuple[Recording, int]]:
    """Recording and row of all visuals of some runs, in order."""
    return [(recording, row) for recording in recordings for row in range(len(recording.visuals))]


def joined_sources(
    sources: Sequence[tuple[Recording, int]], pictures: Sequence[tuple[int, ...]] | None
) -> list[tuple[Recording, int]]:
    """Recording and row of each picture.

    Args:
        sources: of each visual that the tower gave, in the order of the prompts.
        pictures: which of them make each picture; None: each is one.

    Raises:
        ValueError: tiles of one picture come from several runs of the tower.
    """
    if pictures is None:
        return list(sources)
    found: list[tuple[Recording, tuple[int, ...]]] = []
    for tiles in pictures:
        runs = {id(sources[tile][0]) for tile in tiles}
        if len(runs) > 1:
            raise ValueError("Tiles of one picture come from several runs of the vision tower: encode them in one.")
        found.append((sources[tiles[0]][0], tuple(sources[tile][1] for tile in tiles)))
    by_run: dict[int, tuple[Recording, dict[tuple[int, ...], int]]] = {}
    for recording, rows in found:
        places = by_run.setdefault(id(recording), (recording, {}))[1]
        places.setdefault(rows, len(places))  # beams show the same pictures again
    wholes = {run: recording.joined(list(places)) for run, (recording, places) in by_run.items()}
    return [(wholes[id(recording)], by_run[id(recording)][1][rows]) for recording, rows in found]


def entries_of(output: Any, visuals: Sequence[Visual]) -> list[range] | None:
    """The visuals in each tensor of a features call's output, where the model returns those of a prompt in one; None
    where they are one each.

    Raises:
        ValueError: neither fits.
    """
    features = features_in(output)
    if features is None or isinstance(features, Tensor):
        return None
    lengths = [tensor.numel() // tensor.shape[-1] for tensor in features]
    if lengths == [visual.length for visual in visuals]:
        return None
    entries, place = [], 0
    for length in lengths:
        first = place
        while length > 0 and place < len(visuals):
            length -= visuals[place].length
            place += 1
        if length:
            break
        entries.append(range(first, place))
    if len(entries) == len(features) and place == len(visuals):
        return entries
    if len(features) == len(visuals):
        return None
    raise ValueError(
        f"The features call of this model returned {lengths} features, which are no whole visuals of the call's "
        f"{len(visuals)}; this transformers version lays them out differently."
    )


def by_visual(features: Sequence[Tensor], entries: Sequence[range] | None, visuals: Sequence[Visual]) -> list[Tensor]:
    """`[P, D]` of each visual, from tensors that hold those of `entries`, see `entries_of`; from one tensor that holds
    those of all, one after the other (HunYuan-VL in older releases); or from several for each, those of the frames of a
    video (Video-LLaVA)."""
    if entries is None and len(features) == 1 < len(visuals):
        entries = [range(len(visuals))]
    if entries is None:
        parts = _parts([len(tensor) for tensor in features], visuals)
        return [_cat([features[part] for part in own]) for own in parts] if parts else list(features)
    found: list[Tensor] = []
    for tensor, own in zip(features, entries):
        found += tensor.split([visuals[visual].length for visual in own])
    return found


def _parts(lengths: Sequence[int], visuals: Sequence[Visual]) -> list[range] | None:
    """Which tensors of features make each visual, where some are made of several; None where each is one, or they do
    not fit.

    Args:
        lengths: tokens of each tensor.
    """
    if len(lengths) <= len(visuals):
        return None
    parts, place = [], 0
    for visual in visuals:
        first, left = place, visual.length
        while left > 0 and place < len(lengths):
            left -= lengths[place]
            place += 1
        if left:
            return None
        parts.append(range(first, place))
    return parts if place == len(lengths) else None


def tag(output: Any, recording: Recording) -> None:
    """Tie the features in the output of a features call to `recording`."""
    features = features_in(output)
    if isinstance(features, Tensor):
        # on both: generation makes a new tensor for beams, and offloading a new output
        for holder in (output, features):
            setattr(holder, _TAG, (recording, features))
    elif features is not None:
        for row, tensor in enumerate(features):
            setattr(tensor, _TAG, (recording, row))


def sources_of(output: Any, tokens: Sequence[int] = ()) -> list[tuple[Recording, int]] | None:
    """The recording and row that each visual's features in `output` came from; None if they are not known.

    Where features are one tensor for all visuals, generation may have repeated its rows for beams: they are then known
    again by what they hold, and those of equal pictures by where they stand.

    Args:
        tokens: placeholders of each row of the batch; () if they are not known.
    """
    features = features_in(output)
    if features is None:
        return None
    if not isinstance(features, Tensor):
        tagged = [getattr(tensor, _TAG, None) for tensor in features]
        if any(item is None for item in tagged):
            return None
        found: list[tuple[Recording, int]] = []
        for recording, row in tagged:  # type: ignore[misc]
            rows = (row,) if recording.entries is None else recording.entries[row]
            found += [(recording, each) for each in rows]
        return found
    recording, original = getattr(output, _TAG, None) or getattr(features, _TAG, (None, features))
    if recording is None or original.shape[1:] != features.shape[1:]:
        return None
    parts = _parts([original.shape[1]] * len(original), recording.visuals)
    if original is features:
        return [(recording, row) for row in range(len(original) if parts is None else len(parts))]
    # one tensor at a time, so that no [beams, pictures, ...] is formed; one read for all
    same = torch.stack([(tensor == original).flatten(1).all(1) for tensor in features]).tolist()
    if not all(map(any, same)):
        return None
    likely = _repeated([count // features.shape[1] for count in tokens], len(original), len(features))
    rows = [guess if guess is not None and row[guess] else row.index(True) for row, guess in zip(same, likely)]
    whole = rows if parts is None else _whole(rows, parts)
    return None if whole is None else [(recording, row) for row in whole]


def _whole(rows: Sequence[int], parts: Sequence[range]) -> list[int] | None:
    """The visuals that tensors of features make one after the other; None where they are torn apart.

    Args:
        rows: which tensors.
        parts: those of each visual.
    """
    visual_of = {part: visual for visual, own in enumerate(parts) for part in own}
    found: list[int] = []
    place = 0
    while place < len(rows):
        visual = visual_of[rows[place]]
        if [*rows[place : place + len(parts[visual])]] != [*parts[visual]]:
            return None
        found.append(visual)
        place += len(parts[visual])
    return found


def _repeated(rows: Sequence[int], had: int, have: int) -> Sequence[int | None]:
    """Which of `had` visuals stands at each of `have` places, where prompts were repeated, each with all it shows.

    Args:
        rows: visuals of each row of the batch.
    """
    times = have // had if had else 0
    if not times or times * had != have or sum(rows) != have or len(rows) % times:
        return [None] * have
    found: list[int | None] = []
    start = 0
    for first in range(0, len(rows), times):
        found += [start + visual for count in rows[first : first + times] for visual in range(count)]
        start += rows[first]
    return [None if visual is None or visual >= had else visual for visual in found]
