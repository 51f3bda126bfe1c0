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

from tokenprune.engine.hints import Hints
from tokenprune.engine.prompt_reader import Tiles
from tokenprune.engine.tower_layout import Layouts, check_lengths
from tokenprune.engine.tower_mask import check_filling
from tokenprune.engine.tower_pass import TowerPass
from tokenprune.engine.tower_plan import arguments_in_config, spent_signals
from tokenprune.engine.tower_probe import check_tower
from tokenprune.engine.tower_resize import run_smaller
from tokenprune.hooks import Ledger, opaque
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.capability import TOWER_SIGNALS
from tokenprune.interfaces.pruner import Stage
from tokenprune.interfaces.signals import PIXEL_SIGNALS, TOWER_STATES, VISION_SIGNALS, Signal
from tokenprune.interfaces.visual import Visual
from tokenprune.state.forward_call import Calls
from tokenprune.state.tower_recording import Recording, by_visual, entries_of, tag


def _any_pixels(call: Mapping[str, Any]) -> Any:
    """The pixels of a features call, whatever they are called."""
    names = [name for name, value in call.items() if "pixel_values" in name and value is not None]
    if not names:
        raise ValueError("A features call of this model was given no pixels under a name that is known (pixel_values).")
    return call[names[0]]


class TowerHooks:
    """Wraps the calls that run the vision tower.

    Args:
        adapter: the family.
        stages: those at "pixels" and "vision:L".
        signals: what has to be recorded, for any stage of the method.
        hints: what the caller knows of a visual.
        calls: the calls at work.
        tiles: says which visuals of a kind make each picture, see `PromptReader.tiles`.
        verify: whether a tower that no test knows is tried, beyond the order of its patches.
    """

    def __init__(
        self,
        adapter: Adapter,
        stages: Sequence[Stage],
        signals: Sequence[Signal],
        hints: Hints,
        calls: Calls,
        tiles: Callable[[str, Sequence[Visual]], Tiles],
        verify: bool = True,
    ) -> None:
        self.adapter, self.hints, self._calls, self._tiles, self._verify = adapter, hints, calls, tiles, verify
        self._signals = [signal for signal in signals if signal.name in VISION_SIGNALS]
        self._of_blocks = [one for one in self._signals if one.name not in (*PIXEL_SIGNALS, TOWER_STATES)]
        self._planned = arguments_in_config(adapter)
        self._cuts = {stage.after_block: stage for stage in stages if stage.after_block is not None}
        self._shrink = next((s for s in stages if s.place == "pixels" and s.after_block is None), None)
        self._spent = spent_signals(stages, adapter.tower)
        self._layouts = Layouts()

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
        for block in sorted({signal.layer for signal in self._of_blocks}):
            names = [signal for signal in self._of_blocks if signal.layer == block]
            for hook in vision.hook_attention(block, opaque(functools.partial(self._record, names))):
                ledger.hook(hook)
        if len(vision.blocks) and (self._of_blocks or self._cuts):
            first = opaque(self._enter_tower)
            ledger.hook(vision.blocks[0].register_forward_pre_hook(first, with_kwargs=True))
        if self._cuts:
            for block in range(min(self._cuts) + 1, len(vision.blocks)):
                hook = opaque(functools.partial(self._enter_block, block))
                ledger.hook(vision.blocks[block].register_forward_pre_hook(hook, with_kwargs=True))
                attention = vision.masked_attention(block)
                if attention is not None:
                    mask = opaque(functools.partial(self._mask_attention, block))
                    ledger.hook(attention.register_forward_pre_hook(mask, with_kwargs=True))
            for module in vision.exits:  # first, so that others see the length that they expect
                ledger.hook(module.register_forward_hook(opaque(self._leave_tower), prepend=vision.restores_blocks))
        for kind in self.adapter.features:
            owner, name = self.adapter.features_call(kind)
            ledger.set(owner, name, self._wrap(kind, getattr(owner, name)))

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

    def _read_pixels(self, run: TowerPass, pixels: Sequence[Tensor]) -> None:
        for signal in self._signals:
            if signal.name in PIXEL_SIGNALS:
                with run.recording.timer.running(run.recording.device):
                    run.read_pixels(signal, pixels)

    def _read_behind(self, run: TowerPass, kind: str, original: Callable[..., Any], call: Mapping[str, Any]) -> None:
        """Read the signals of a tower whose visuals were laid out behind it."""
        if self._signals:
            self._check_tower(run, kind, original, call)
            run.laid_out()
            self._read_pixels(run, cast("list[Tensor]", run.recording.pixels))

    def _check_tower(self, run: TowerPass, kind: str, original: Callable[..., Any], call: Mapping[str, Any]) -> None:
        run.probing = True
        blocks = sorted({signal.layer for signal in self._of_blocks})
        short = range(min(self._cuts) + 1, self.adapter.tower.feature_layer + 1) if self._cuts else ()
        try:
            check_tower(self.adapter, kind, original, call, run.recording.visuals, blocks, short, self._verify)
        finally:
            run.probing = False

    def _lay_out_before(
        self, run: TowerPass, kind: str, original: Callable[..., Any], call: Mapping[str, Any], named: Mapping[str, Any]
    ) -> None:
        """Lay out the visuals of a tower before it runs, where its family knows them by their features only: tokens
        are to leave inside."""
        run.probing = True
        try:
            visuals = self._layouts.of(self.adapter, kind, original, call, named)
        finally:
            run.probing = False
        run.recording.lay_out(visuals, self.adapter.pixel_rows(kind, named, visuals))
        self._check_tower(run, kind, original, call)
        run.laid_out()
        self._read_pixels(run, cast("list[Tensor]", run.recording.pixels))

    def _check_cuts(self, run: TowerPass, kind: str) -> None:
        """Hold what is to be cut inside the tower against what is known of its visuals, and find out which are tiles of
        one picture, which share its budget."""
        visuals, cuts = run.recording.visuals, list(self._cuts.values())
        if not cuts:
            return
        if any(visual.resample is not None and visual.sources is None for visual in visuals):
            raise ValueError(
                f"{cuts[0].pruner.name} takes tokens out of the vision tower (at {cuts[0].site!r}), but a visual "
                f"token of this {kind} is mixed from several places there (interpolated or pooled). Use a method "
                "that cuts at 'input' or at a layer."
            )
        try:
            run.pictures = self._tiles(kind, visuals)
        except LookupError as error:
            counted = next((stage for stage in cuts if isinstance(stage.budget.keep, int)), None)
            if counted is not None:
                raise ValueError(
                    f"{counted.pruner.name} keeps {counted.budget} tokens of each picture inside the vision tower of "
                    f"{type(self.adapter.model).__name__}, which is given tiles, and which of them make a picture is "
                    "read off the prompt: here features are asked for without one. Let forward() or generate() encode "
                    "the pictures, or give keep as a fraction."
                ) from error

    def _enter_tower(self, module: Any, args: Any, kwargs: Any) -> None:
        run = self._run
        if run is not None and not run.probing and (run.waits or run.grids):
            run.once_laid_out(lambda: check_filling(self.adapter, run.run, args, kwargs))

    def _record(self, signals: Sequence[Signal], read: Any) -> None:
        run = self._run
        if run is not None and not run.probing:
            with run.recording.timer.running(run.recording.device):
                run.once_laid_out(functools.partial(run.record, signals, read))

    def _record_states(self, signal: Signal, hidden: Tensor) -> None:
        run = self._run
        if run is not None and not run.probing:
            with run.recording.timer.running(run.recording.device):
                run.once_laid_out(functools.partial(run.record_states, signal, hidden))

    def _enter_block(self, block: int, module: Any, args: Any, kwargs: Any) -> Any:
        run, vision = self._run, self.adapter.vision
        if run is None or run.probing:
            return None
        if not args:
            args, kwargs = (kwargs["hidden_states"],), {k: v for k, v in kwargs.items() if k != "hidden_states"}
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
        short = None if all(alive is None for alive in run.alive) else vision.drop_tokens(run.run, args, kwargs, kept)
        if not run.patches:
            run.first_short = block
        run.patches.append([count * vision.patches_per_cell for count in vision.computed(run.run, run.counts)])
        return short

    def _mask_attention(self, block: int, module: Any, args: Any, kwargs: Any) -> Any:
        run = self._run
        if run is None or run.probing:
            return None
        mask = self.adapter.vision.attention_mask(run.run, block, args[0] if args else kwargs["hidden_states"])
        return None if mask is None else (args, {**kwargs, "attention_mask": mask})

    def _leave_tower(self, module: Any, args: Any, output: Any) -> Any:
        run = self._run
        if run is None or run.probing or all(alive is None for alive in run.alive):
            return None
        if isinstance(output, tuple):
            return (self._leave_tower(module, args, output[0]), *output[1:])
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
            before = behind and bool(self._cuts)
            run = self._calls.tower = TowerPass(recording, self.adapter, self.hints)
            try:
                if before:
                    self._lay_out_before(run, kind, original, call, named)
                elif not behind:
                    self._read_pixels(run, pixels)
                self._check_cuts(run, kind)
                if self._shrink is not None:
                    output = run_smaller(self.adapter, self._shrink, kind, original, call, recording, run.shrink)
                else:
                    output = original(**call)
                if before:
                    visuals = recording.visuals
                    recording.features = by_visual(
                        self.adapter.feature_rows(output), entries_of(output, visuals), visuals
                    )
                    check_lengths(self.adapter, recording)
                elif behind:
                    visuals = self.adapter.visuals_behind(kind, named, output)
                    recording.lay_out(visuals, self.adapter.pixel_rows(kind, named, visuals))
                    features = self.adapter.feature_rows(output)
                    recording.features = by_visual(features, entries_of(output, visuals), visuals)
                    self._read_behind(run, kind, original, call)
                run.finish()
            finally:
                self._calls.tower = None
            recording.entries = entries_of(output, visuals)
            tag(output, recording)
            if self._calls.now is not None and self._calls.now.entered:
                self._calls.now.recordings.setdefault(kind, []).append(recording)
            return output

        return opaque(features)
