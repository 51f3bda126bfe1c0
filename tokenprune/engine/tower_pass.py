"""One run of the vision tower over the visuals of one kind: signals of its blocks, and cells that stages leave."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tokenprune.capture.vision import grey_entropy, grey_levels, vision_signal
from tokenprune.engine.batched_selection import SelectionRequest, choose, joined_sizes
from tokenprune.engine.hints import Hints
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.pruner import Stage
from tokenprune.interfaces.signals import PIXEL_SIGNALS, Signal
from tokenprune.interfaces.visual import Raster, Visual, joined
from tokenprune.state.prompt_state import multiplied_sizes
from tokenprune.state.tower_recording import KeptBeforeProjector, Recording


def _joined(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.empty(0)


class TowerPass:
    """One run of the tower over the visuals of one kind.

    Pictures are the crops of all visuals in tower order. `alive[p]` says which cells of picture p are left.
    """

    def __init__(self, recording: Recording, adapter: Adapter, hints: Hints) -> None:
        self.recording, self._adapter, self._hints = recording, adapter, hints
        self.probing = False  # the tower runs once more, and is tried
        self.waits = adapter.behind_tower  # for its visuals
        self.pictures: Sequence[Sequence[int]] | None = None  # visuals that are tiles of one; None: each is one
        self._later: list[Callable[[], None]] = []
        self.lay_out()

    def lay_out(self) -> None:
        """Begin with the recording's visuals."""
        recording = self.recording
        self._spread: list[Tensor] = []
        self.grids = [grid for visual in recording.visuals for grid in visual.tower_grids]
        self.visual_of = [v for v, visual in enumerate(recording.visuals) for _ in visual.tower_grids]
        self.counts = [rows * cols for rows, cols in self.grids]
        self.alive: list[Tensor | None] = [None] * len(self.grids)
        self.carry: list[Mapping[str, Tensor]] = [{} for _ in self.grids]
        self.sizes: list[Tensor | None] = [None] * len(self.grids)
        self.latest: dict[Signal, list[Tensor]] = {}
        self.among: dict[Signal, list[Tensor | None]] = {}  # cells that were there when a signal was recorded
        self.patches: list[list[int]] = []
        self.first_short = 0

    def once_laid_out(self, read: Callable[[], None]) -> None:
        """Read something of a run; where its visuals are not laid out yet, once they are."""
        if self.waits:
            self._later.append(read)
        else:
            read()

    def laid_out(self) -> None:
        """Visuals were laid out since it began: read what waited for them."""
        self.lay_out()
        self.waits = False
        for read in self._later:
            read()
        self._later = []

    def shrink(self, grids: Sequence[tuple[int, int]], places: list[Tensor]) -> None:
        """Pictures are run at the smaller `grids`, one for each visual.

        Args:
            places: for each visual where its cells, of all of its pictures, stand among those of the larger grids.
        """
        self.grids = [grids[visual] for visual in self.visual_of]
        self.counts = [rows * cols for rows, cols in self.grids]
        self._spread = places

    def groups(self) -> dict[int, list[int]]:
        """Pictures by the number of cells they have left."""
        by_count: dict[int, list[int]] = {}
        for picture, count in enumerate(self.counts):
            by_count.setdefault(count, []).append(picture)
        return by_count

    @functools.cached_property
    def run(self) -> Any:
        """What the tower's adapter knows of this run."""
        return self._adapter.vision.start(self.grids)

    def record(
        self,
        signals: Sequence[Signal],
        read: Callable[[Any, Sequence[int], int], tuple[Tensor, Tensor, Tensor]],
    ) -> None:
        """Compute signals of the block that just ran, for all pictures."""
        vision = self._adapter.vision
        before = int(vision.facts.has_cls)
        self._begin(signals)
        for count, pictures in self.groups().items():
            query, key, value = read(self.run, pictures, count)
            for signal in signals:
                by_patch, multiplied = vision_signal(signal, query, key, value, before)
                by_cell = vision.in_raster_order(self.run, vision.by_cell(by_patch), pictures)
                # rows of every head against keys
                self.recording.selection_flops += 2 * multiplied * key.shape[0] * query.shape[1] * key.shape[3]
                for row, picture in enumerate(pictures):
                    self.latest[signal][picture] = by_cell[row]

    def record_states(self, signal: Signal, hidden: Tensor) -> None:
        """Take the hidden states that a block leaves, for all pictures."""
        self._begin([signal])
        for count, pictures in self.groups().items():
            states = self._adapter.vision.states(self.run, (hidden,), pictures, count)  # [m, count, D]
            for picture, value in zip(pictures, states.float()):
                self.latest[signal][picture] = value

    def _begin(self, signals: Sequence[Signal]) -> None:
        for signal in signals:
            self.latest[signal] = [torch.empty(0)] * len(self.counts)
            self.among[signal] = list(self.alive)

    @functools.cached_property
    def _cell_pixels(self) -> list[Tensor]:
        """`[cells, C n]` of each picture: its pixels, the first colour first."""
        vision, recording = self._adapter.vision, self.recording
        cells: list[Tensor] = []
        for visual, of_visual in zip(recording.visuals, recording.pixels):
            of_one = cast(Tensor, of_visual)  # tiles are joined to pictures behind the tower
            cells += [own.flatten(1) for own in vision.cell_pixels(of_one.detach(), visual.tower_grids, visual.kind)]
        return cells

    def cut(self, stage: Stage, args: Any) -> tuple[list[Tensor], list[Tensor | None]] | None:
        """Let a stage choose among the cells after its block; what stays of each picture, among those that were
        there, and the states `[k, D]` that stand there where it merged."""
        vision = self._adapter.vision
        budgets = self._budgets(stage)
        asked = [self._ask(stage, args, picture, budgets[picture]) for picture in range(len(self.grids))]
        answers, flops = choose(stage, vision.facts, asked)
        self.recording.selection_flops += flops
        kept: list[Tensor] = []
        merged = [None if answer is None else answer.features for answer in answers]
        for picture, answer in enumerate(answers):
            everything = torch.arange(self.counts[picture], device=args[0].device)
            if answer is None:
                kept.append(everything)
                continue
            indices = answer.indices
            self.carry[picture] = {name: values[indices] for name, values in answer.carry.items()}
            self.sizes[picture] = multiplied_sizes(self.sizes[picture], indices, joined_sizes(stage, [(0, answer)]))
            if answer.merged is not None:
                self.recording.merged.append(answer.merged)
            kept.append(indices)
        if all(index.shape[0] == count for index, count in zip(kept, self.counts)):
            return None
        for picture, index in enumerate(kept):
            alive = self.alive[picture]
            self.alive[picture] = index if alive is None else alive[index]
            self.counts[picture] = index.shape[0]
        self.recording.cuts.append((int(stage.after_block or 0), tuple(self.alive)))
        return kept, merged

    def _ask(self, stage: Stage, args: Any, picture: int, budget: int) -> SelectionRequest:
        visual, count = self.recording.visuals[self.visual_of[picture]], self.counts[picture]
        first = self.visual_of.index(self.visual_of[picture])
        rows, cols = self.grids[picture]
        vision = self._adapter.vision
        place = self.visual_of[picture]
        tiles = next((own for own in self.pictures or () if place in own), (place,))
        cells = {number: [h * w for (h, w), of in zip(self.grids, self.visual_of) if of == number] for number in tiles}
        earlier = sum(sum(cells[number]) for number in tiles[: tiles.index(place)])
        return SelectionRequest(
            owner=picture,
            rasters=(Raster((rows, cols)),),
            count=count,
            budget=min(max(budget, 1), count),
            tokens=self.alive[picture],
            features=lambda: (
                self._cell_pixels[picture]
                if stage.place == "pixels"
                else vision.states(self.run, args, [picture], count)[0]
            ),
            signal=lambda signal: self._signal(signal, picture),
            key=lambda: self.recording.pixel_key(place) + picture - first,
            hint=lambda name: self._hints.of_tower(
                name, visual.kind, place, len(self.recording.visuals), self.pictures
            ),
            carry=self.carry[picture],
            first=earlier + sum(cells[place][: picture - first]),
            total=sum(sum(own) for own in cells.values()),
        )

    def _budgets(self, stage: Stage) -> list[int]:
        """What each picture that the tower is given keeps, of the share of the image or video that it is part of."""
        visuals = self.recording.visuals
        groups = [*(self.pictures or ())]
        told = {number for group in groups for number in group}
        groups += [(number,) for number in range(len(visuals)) if number not in told]
        found: dict[int, list[int]] = {}
        for group in groups:
            shares = stage.budget.pictures(joined([visuals[number] for number in group]))
            for number in group:
                crops = len(visuals[number].tower_grids)
                found[number], shares = shares[:crops], shares[crops:]
        return [share for number in sorted(found) for share in found[number]]

    def _signal(self, signal: Signal, picture: int) -> Tensor:
        values, alive = self.latest[signal][picture], self.alive[picture]
        if values.shape[0] == self.counts[picture] or alive is None:
            return values
        return self._full(signal, picture)[alive]

    def read_pixels(self, signal: Signal, pixels: Sequence[Tensor]) -> None:
        """Compute a signal of the pixels of each visual."""
        vision, base, colours = self._adapter.vision, signal.settings[0], signal.settings[1:]
        values: list[Tensor] = []
        for visual, of_visual in zip(self.recording.visuals, pixels):
            patches = vision.patch_pixels(of_visual, len(visual.tower_grids))
            entropy = grey_entropy(grey_levels(patches, colours[:3], colours[3:]), base)
            values += vision.pixels_by_cell(entropy.softmax(dim=1), visual.tower_grids)
        self.latest[signal] = values
        self.among[signal] = [None] * len(values)

    def finish(self) -> None:
        """Hand signals and survivors to the recording."""
        recording = self.recording
        by_visual: list[list[int]] = [[] for _ in recording.visuals]
        for picture, visual in enumerate(self.visual_of):
            by_visual[visual].append(picture)
        for signal, values in self.latest.items():
            # signals of the pixels are those of the picture as it came
            large = bool(self._spread) and signal.name in PIXEL_SIGNALS
            full = values if large else [self._full(signal, picture) for picture in range(len(values))]
            joined = [_joined([full[p] for p in pictures]) for pictures in by_visual]
            recording.signals[signal] = self._spread_out(joined) if self._spread and not large else joined
        if all(alive is None for alive in self.alive):
            return
        recording.patches, recording.first_short = self.patches, self.first_short
        vision = self._adapter.vision
        if not vision.restores_blocks:
            recording.left = vision.computed(self.run, self.counts)
        for row, pictures in enumerate(by_visual):
            recording.kept[row] = self._survivors(recording.visuals[row], pictures)

    def _spread_out(self, values: list[Tensor]) -> list[Tensor]:
        """Values of the cells of smaller grids at their places in the larger ones, zeros elsewhere."""
        return [
            value.new_zeros(visual.num_tokens, *value.shape[1:]).index_copy(0, index.to(value.device), value)
            for visual, value, index in zip(self.recording.visuals, values, self._spread)
        ]

    def _full(self, signal: Signal, picture: int) -> Tensor:
        """A signal of all cells of a picture: zeros at those that had left when it was recorded."""
        value, there = self.latest[signal][picture], self.among[signal][picture]
        if there is None:
            return value
        rows, cols = self.grids[picture]
        return value.new_zeros(rows * cols, *value.shape[1:]).index_copy(0, there, value)

    @functools.cached_property
    def _alive_on_host(self) -> list[Tensor | None]:
        """`alive` behind the last cut, of all pictures in one read."""
        there = [alive for alive in self.alive if alive is not None]
        parts = iter(torch.cat(there).cpu().split([alive.shape[0] for alive in there]))
        return [None if alive is None else next(parts) for alive in self.alive]

    def _survivors(self, visual: Visual, pictures: list[int]) -> KeptBeforeProjector:
        cells = [self.grids[p][0] * self.grids[p][1] for p in pictures]
        if visual.sources is None and len(pictures) == 1:
            alive = self.alive[pictures[0]]
            tokens = torch.arange(cells[0]) if alive is None else alive
            only = pictures[0]
            return KeptBeforeProjector(tokens, self.counts[only], dict(self.carry[only]), self.sizes[only])
        there = []
        for picture, count in zip(pictures, cells):
            alive = self._alive_on_host[picture]
            mask = torch.ones(count, dtype=torch.bool) if alive is None else torch.zeros(count, dtype=torch.bool)
            there.append(mask if alive is None else mask.index_fill(0, alive, True))
        mask = torch.cat(there)
        tokens = (mask if visual.sources is None else mask[visual.sources]).nonzero()[:, 0]
        tokens = tokens.to(self.recording.device)
        return KeptBeforeProjector(tokens, tokens.shape[0], {}, self._token_sizes(visual, pictures, cells, tokens))

    def _token_sizes(self, visual: Visual, pictures: list[int], cells: list[int], tokens: Tensor) -> Tensor | None:
        """`[k]`: sizes of the tokens `[k]` of a visual that comes from several pictures of so many cells."""
        if all(self.sizes[picture] is None for picture in pictures):
            return None
        of_cells = []
        for picture, count in zip(pictures, cells):
            sizes, alive = self.sizes[picture], self.alive[picture]
            ones = torch.ones(count, device=tokens.device)
            if sizes is not None:
                ones = sizes if alive is None else ones.index_copy(0, alive, sizes)
            of_cells.append(ones)
        by_cell = torch.cat(of_cells)
        return (by_cell if visual.sources is None else by_cell[visual.sources.to(by_cell.device)])[tokens]
