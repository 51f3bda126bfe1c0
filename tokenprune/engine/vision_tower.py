"""What happens while the vision tower runs: signals are read off its blocks, and stages at "pixels" and "vision:L" cut.

Tokens that leave inside the tower come back as zeros behind the projector, so that the model's own merging of text and
pictures sees the lengths it expects; they leave the prompt before the decoder.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tokenprune.capture.vision import grey_entropy, grey_levels, vision_signal
from tokenprune.engine.batched_selection import SelectionRequest, choose, joined_sizes
from tokenprune.engine.hints import Hints
from tokenprune.engine.tower_plan import arguments_in_config, spent_signals
from tokenprune.engine.tower_resize import run_smaller
from tokenprune.hooks import Ledger, opaque
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.capability import TOWER_SIGNALS
from tokenprune.interfaces.pruner import Stage
from tokenprune.interfaces.signals import PIXEL_SIGNALS, TOWER_STATES, VISION_SIGNALS, Signal
from tokenprune.interfaces.visual import Raster, Visual
from tokenprune.state.forward_call import Calls
from tokenprune.state.prompt_state import multiplied_sizes
from tokenprune.state.tower_recording import KeptBeforeProjector, Recording, by_visual, entries_of, tag


def _joined(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.empty(0)


def _any_pixels(call: Mapping[str, Any]) -> Any:
    """The pixels of a features call, whatever they are called."""
    names = [name for name, value in call.items() if "pixel_values" in name and value is not None]
    if not names:
        raise ValueError("A features call of this model was given no pixels under a name that is known (pixel_values).")
    return call[names[0]]


class TowerPass:
    """One run of the tower over the visuals of one kind.

    Pictures are the crops of all visuals in tower order. `alive[p]` says which cells of picture p are left.
    """

    def __init__(self, recording: Recording, owner: TowerHooks) -> None:
        self.recording, self._owner = recording, owner
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
        return self._owner.adapter.vision.start(self.grids)

    def record(
        self,
        signals: Sequence[Signal],
        read: Callable[[Any, Sequence[int], int], tuple[Tensor, Tensor, Tensor]],
    ) -> None:
        """Compute signals of the block that just ran, for all pictures."""
        vision = self._owner.adapter.vision
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
            states = self._owner.adapter.vision.states(self.run, (hidden,), pictures, count)  # [m, count, D]
            for picture, value in zip(pictures, states.float()):
                self.latest[signal][picture] = value

    def _begin(self, signals: Sequence[Signal]) -> None:
        for signal in signals:
            self.latest[signal] = [torch.empty(0)] * len(self.counts)
            self.among[signal] = list(self.alive)

    @functools.cached_property
    def _cell_pixels(self) -> list[Tensor]:
        """`[cells, C n]` of each picture: its pixels, the first colour first."""
        vision, recording = self._owner.adapter.vision, self.recording
        cells: list[Tensor] = []
        for visual, of_visual in zip(recording.visuals, recording.pixels):
            of_one = cast(Tensor, of_visual)  # tiles are joined to pictures behind the tower
            cells += vision.cell_pixels(of_one.detach(), len(visual.tower_grids), visual.kind).flatten(2)
        return cells

    def cut(self, stage: Stage, args: Any) -> tuple[list[Tensor], list[Tensor | None]] | None:
        """Let a stage choose among the cells after its block; what stays of each picture, among those that were
        there, and the states `[k, D]` that stand there where it merged."""
        vision = self._owner.adapter.vision
        asked = [self._ask(stage, args, picture) for picture in range(len(self.grids))]
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

    def _ask(self, stage: Stage, args: Any, picture: int) -> SelectionRequest:
        visual, count = self.recording.visuals[self.visual_of[picture]], self.counts[picture]
        first = self.visual_of.index(self.visual_of[picture])
        budget = stage.budget.pictures(visual)[picture - first]
        rows, cols = self.grids[picture]
        vision = self._owner.adapter.vision
        place = self.visual_of[picture]
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
            hint=lambda name: self._owner.hints.of_tower(name, visual.kind, place, len(self.recording.visuals)),
            carry=self.carry[picture],
            first=sum(h * w for h, w in self.grids[first:picture]),
            total=sum(h * w for (h, w), owner in zip(self.grids, self.visual_of) if owner == place),
        )

    def _signal(self, signal: Signal, picture: int) -> Tensor:
        values, alive = self.latest[signal][picture], self.alive[picture]
        if values.shape[0] == self.counts[picture] or alive is None:
            return values
        return self._full(signal, picture)[alive]

    def read_pixels(self, signal: Signal, pixels: Sequence[Tensor]) -> None:
        """Compute a signal of the pixels of each visual."""
        vision, base, colours = self._owner.adapter.vision, signal.settings[0], signal.settings[1:]
        values: list[Tensor] = []
        for visual, of_visual in zip(self.recording.visuals, pixels):
            patches = vision.patch_pixels(of_visual, len(visual.tower_grids))
            entropy = grey_entropy(grey_levels(patches, colours[:3], colours[3:]), base)
            values += vision.by_cell(entropy.softmax(dim=1))
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
        recording.left = self._owner.adapter.vision.computed(self.counts)
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


class TowerHooks:
    """Wraps the calls that run the vision tower.

    Args:
        adapter: the family.
        stages: those at "pixels" and "vision:L".
        signals: what has to be recorded, for any stage of the method.
        hints: what the caller knows of a visual.
        calls: the calls at work.
    """

    def __init__(
        self, adapter: Adapter, stages: Sequence[Stage], signals: Sequence[Signal], hints: Hints, calls: Calls
    ) -> None:
        self.adapter, self.hints, self._calls = adapter, hints, calls
        self._signals = [signal for signal in signals if signal.name in VISION_SIGNALS]
        self._planned = arguments_in_config(adapter)
        self._cuts = {stage.after_block: stage for stage in stages if stage.after_block is not None}
        self._shrink = next((s for s in stages if s.place == "pixels" and s.after_block is None), None)
        self._spent = spent_signals(stages, adapter.tower)

    def check_planned(self, call: Mapping[str, Any]) -> None:
        """Raise ValueError where a call, or the config since, asks for visual features other than those that the method
        was planned for.

        Args:
            call: its arguments, by name.
        """
        for name, planned in self._planned.items():
            given = call.get(name)
            given = getattr(self.adapter.model.config, name) if given is None else given
            if given != planned:
                raise ValueError(
                    f"{name} is {given!r} in this call, and was {planned!r} in the model's config when the method was "
                    f"applied. Call the handle's remove(), set model.config.{name}, and apply the method again."
                )

    @property
    def _run(self) -> TowerPass | None:
        return self._calls.tower

    def install(self, ledger: Ledger) -> None:
        """Place the hooks and wrap the calls; `ledger` takes them away."""
        vision = self.adapter.vision
        for signal in self._signals:
            self._check(signal)
        for signal in self._signals:
            if signal.name == TOWER_STATES:
                done = opaque(functools.partial(self._record_states, signal))
                for hook in vision.hook_states(signal.layer, done):
                    ledger.hook(hook)
        of_blocks = [signal for signal in self._signals if signal.name not in (*PIXEL_SIGNALS, TOWER_STATES)]
        for block in sorted({signal.layer for signal in of_blocks}):
            names = [signal for signal in of_blocks if signal.layer == block]
            for hook in vision.hook_attention(block, opaque(functools.partial(self._record, names))):
                ledger.hook(hook)
        if self._cuts:
            for block in range(min(self._cuts) + 1, len(vision.blocks)):
                hook = opaque(functools.partial(self._enter_block, block))
                ledger.hook(vision.blocks[block].register_forward_pre_hook(hook, with_kwargs=True))
            for module in vision.exits:
                ledger.hook(module.register_forward_hook(opaque(self._leave_tower)))
        for kind, name in self.adapter.features.items():
            original = getattr(self.adapter.entry, name)
            ledger.set(self.adapter.entry, name, self._wrap(kind, original))

    def _check(self, signal: Signal) -> None:
        vision = self.adapter.vision
        if signal.name not in vision.signals:
            gives = ", ".join(vision.signals) or f"none: {type(self.adapter.model).__name__} has no {TOWER_SIGNALS}"
            raise ValueError(f"The vision tower of this model gives no {signal.name!r}; it gives {gives}.")
        if not 0 <= signal.layer < vision.facts.num_layers:
            raise ValueError(
                f"{signal.name} of vision block {signal.layer} was asked for; the tower has blocks "
                f"0 to {vision.facts.num_layers - 1}."
            )

    def _record(self, signals: Sequence[Signal], read: Any) -> None:
        if self._run is not None:
            with self._run.recording.timer.running(self._run.recording.device):
                self._run.record(signals, read)

    def _record_states(self, signal: Signal, hidden: Tensor) -> None:
        if self._run is not None:
            with self._run.recording.timer.running(self._run.recording.device):
                self._run.record_states(signal, hidden)

    def _enter_block(self, block: int, module: Any, args: Any, kwargs: Any) -> Any:
        run, vision = self._run, self.adapter.vision
        if run is None:
            return None
        stage, kept = self._cuts.get(block - 1), None
        if stage is not None:
            with run.recording.timer.running(run.recording.device):
                chosen = run.cut(stage, args)
            for signal in self._spent.get(block - 1, ()):
                run.latest.pop(signal, None)
            if chosen is not None:
                kept, merged = chosen
                if any(states is not None for states in merged):
                    args = vision.replace_states(run.run, args, kept, merged)
        if not run.patches:
            run.first_short = block
        run.patches.append([count * vision.patches_per_cell for count in vision.computed(run.counts)])
        if all(alive is None for alive in run.alive):
            return None
        return vision.drop_tokens(run.run, args, kwargs, kept)

    def _leave_tower(self, module: Any, args: Any, output: Any) -> Any:
        run = self._run
        if run is None or all(alive is None for alive in run.alive):
            return None
        device = output.device
        whole = [
            torch.arange(rows * cols, device=device) if alive is None else alive.to(device)
            for (rows, cols), alive in zip(run.grids, run.alive)
        ]
        return self.adapter.vision.restore_length(run.run, output, whole)

    def _wrap(self, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)
        parameters = list(signature.parameters)

        @functools.wraps(original)
        def features(*args: Any, **kwargs: Any) -> Any:
            if self._run is not None:  # one features call may make use of the other
                return original(*args, **kwargs)
            call = {**dict(zip(parameters, args)), **kwargs}
            self.check_planned(call)
            name, behind = self.adapter.pixels[kind], self.adapter.behind_tower
            # transformers before 5.20 calls the pixels of videos by the name of those of images
            named = call if call.get(name) is not None else {**call, name: _any_pixels(call)}
            laid_out = None if self._calls.now is None else self._calls.now.laid_out.get(kind)
            if laid_out is not None and laid_out[0] is named[name]:
                visuals = laid_out[1]
            else:
                visuals = [] if behind else self.adapter.visuals(kind, named)
            pixels = [] if behind else self.adapter.pixel_rows(kind, named, visuals)
            recording = Recording(visuals, named[name], pixels)
            cuts = list(self._cuts.values())
            if cuts and any(visual.resample is not None and visual.sources is None for visual in visuals):
                raise ValueError(
                    f"{cuts[0].pruner.name} takes tokens out of the vision tower (at {cuts[0].site!r}), but a visual "
                    f"token of this {kind} is mixed from several places there (interpolated or pooled). Use a method "
                    "that cuts at 'input' or at a layer."
                )
            run = self._calls.tower = TowerPass(recording, self)
            try:
                for signal in self._signals:
                    if signal.name in PIXEL_SIGNALS:
                        with recording.timer.running(recording.device):
                            run.read_pixels(signal, pixels)
                if self._shrink is not None:
                    output = run_smaller(self.adapter, self._shrink, kind, original, call, recording, run.shrink)
                else:
                    output = original(**call)
                if behind:
                    visuals = self.adapter.visuals_behind(kind, named, output)
                    recording.lay_out(visuals, self.adapter.pixel_rows(kind, named, visuals))
                    features = self.adapter.feature_rows(output)
                    recording.features = by_visual(features, entries_of(output, visuals), visuals)
                run.finish()
            finally:
                self._calls.tower = None
            recording.entries = entries_of(output, visuals)
            tag(output, recording)
            if self._calls.now is not None and self._calls.now.entered:
                self._calls.now.recordings.setdefault(kind, []).append(recording)
            return output

        return opaque(features)
