"""The one engine: it finds the visual tokens of a prompt, lets a method choose, and shortens what the decoder is given.

It works through public seams of stock models: hooks on the module that merges text and images (`entry`), on the decoder
stack, on the blocks whose signals were asked for, and a wrapper of `get_image_features` on that one object. It knows
neither a family's name nor a method's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters._base import Adapter
from tokenprune.base import Pruner, View
from tokenprune.budget import Budget
from tokenprune.cache import PrunedPrompt, mark_pruned, pruned_prompt
from tokenprune.compaction import Compaction, plan_compaction
from tokenprune.layout import Layout, build_layout
from tokenprune.ledger import Ledger
from tokenprune.recording import Recording, gather_rows, source, tag
from tokenprune.selection import Selection, grid_places
from tokenprune.signals import Signal
from tokenprune.stopwatch import Stopwatch
from tokenprune.training import LossAfterPruning


@dataclass
class Prompt:
    """What became of the last batch of prompts.

    Attributes:
        layout: where its visual tokens were.
        kept: for each span of the layout, the kept raster indices, `[k]`; None where all stayed.
        lengths: attended tokens of each row before pruning.
        lengths_kept: the same after it.
        tower_grid: raster that the vision tower really worked on, if a method shrank the picture.
        watch: time of signals and selection.
        sources: recording and row of each span.
    """

    layout: Layout
    kept: list[Tensor | None] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    lengths_kept: list[int] = field(default_factory=list)
    tower_grid: tuple[int, int] | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    sources: list[tuple[Recording, int]] = field(default_factory=list)
    past: int = 0


class Engine:
    """Runs one method on one model.

    Args:
        adapter: the model's family.
        pruner: the method.
        budget: tokens to keep of each image.
    """

    def __init__(self, adapter: Adapter, pruner: Pruner, budget: Budget) -> None:
        self.adapter = adapter
        self.pruner = pruner
        self.budget = budget
        self.hints: dict[str, list[Any]] = {}
        self.last: Prompt | None = None
        self.watch = Stopwatch()
        self._prompt: Prompt | None = None
        self._recordings: list[Recording] = []
        self._recording: Recording | None = None
        self._compaction: Compaction | None = None
        self._pending: PrunedPrompt | None = None
        self._parameters = list(inspect.signature(adapter.entry.forward).parameters)

    def install(self, ledger: Ledger) -> None:
        """Place every hook; `ledger` takes them away."""
        adapter = self.adapter
        signals = tuple(dict.fromkeys(self.pruner.signals(adapter.tower)))
        for signal in signals:
            adapter.check_signal(signal)
        for signal in signals:
            for hook in adapter.record(signal, self._emit):
                ledger.hook(hook)
        ledger.hook(adapter.entry.register_forward_pre_hook(self._enter, with_kwargs=True))
        ledger.hook(adapter.entry.register_forward_hook(self._leave, always_call=True))
        decoder = adapter.language_model
        ledger.hook(decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        ledger.hook(decoder.register_forward_hook(self._after_decoder))
        LossAfterPruning(lambda: self._compaction).install(adapter.model, ledger)
        original = adapter.entry.get_image_features
        ledger.set(adapter.entry, "get_image_features", self._wrap_features(original))

    # --- the vision tower -------------------------------------------------------------------------------------------

    def _emit(self, signal: Signal, compute: Callable[[], Tensor]) -> None:
        if self._recording is not None:
            with self.watch.running(self._recording.device):
                self._recording.signals[signal] = compute()

    def _wrap_features(self, original: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(original).parameters)

        @functools.wraps(original)
        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            call = {**dict(zip(parameters, args)), **kwargs}
            pixels = call["pixel_values"]
            self.watch = Stopwatch()
            recording = self._recording = Recording(pixels, self.adapter.image_grids(pixels))
            try:
                if self.pruner.site == "pixels":
                    output = self._small_features(original, call, recording)
                else:
                    output = original(**call)
            finally:
                self._recording = None
            features = getattr(output, "pooler_output", None)
            if features is not None:
                tag(features, recording)
            self._recordings.append(recording)
            return output

        return get_image_features

    def _small_features(self, original: Callable[..., Any], call: dict[str, Any], recording: Recording) -> Any:
        """Run the tower on fewer pixels; its tokens stand at their cells' centres, zeros elsewhere (they leave)."""
        grid = recording.grids[0]
        if any(other != grid for other in recording.grids):
            raise ValueError(f"{self.pruner.name} needs images of one grid in a call, got {recording.grids}.")
        small = self.pruner.target_grid(grid, self.budget.tokens(grid[0] * grid[1]))
        if small == grid:
            return original(**call)
        pixels, extra = self.adapter.resize(call["pixel_values"], small)
        output = original(**{**call, **extra, "pixel_values": pixels, "return_dict": True})
        recording.kept = grid_places(grid, small)
        recording.tower_grid = small
        full = []
        for tokens in output.pooler_output:
            places = torch.tensor(recording.kept, device=tokens.device)
            full.append(tokens.new_zeros(grid[0] * grid[1], tokens.shape[-1]).index_copy(0, places, tokens))
        output.pooler_output = full
        return output

    # --- the prompt -------------------------------------------------------------------------------------------------

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._prompt, self._compaction, self._pending, self._recordings = None, None, None, []
        call = {**dict(zip(self._parameters, args)), **kwargs}
        encoded = (call.get("mm_encoder_outputs") or {}).get("image")
        pixels = call.get("pixel_values")
        if encoded is None and pixels is None:
            return
        if getattr(call.get("past_key_values"), "is_compileable", False):
            raise ValueError(
                "A static cache has one fixed length for all layers and rows, so it cannot hold a pruned prompt. "
                "Use the default dynamic cache (leave cache_implementation and past_key_values alone)."
            )
        sources: list[tuple[Recording, int]] = []
        if encoded is not None:
            for tensor in encoded.pooler_output:
                found = source(tensor)
                if found is None:
                    raise ValueError(
                        "mm_encoder_outputs holds image features that were computed before tokenprune was applied to "
                        "the model. Compute them again, or pass pixel_values."
                    )
                sources.append(found)
            grids = [recording.grids[row] for recording, row in sources]
        else:
            grids = self.adapter.image_grids(call["pixel_values"])
        layout = build_layout(self._visual(call).cpu(), grids)
        prompt = Prompt(layout, sources=sources)
        mask = call.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            prompt.lengths = mask[:, -layout.length :].sum(1).tolist()
        else:
            prompt.lengths = [layout.length] * layout.batch_size
        self._prompt = prompt

    def _visual(self, call: dict[str, Any]) -> Tensor:
        input_ids = call.get("input_ids")
        if input_ids is not None:
            return input_ids == self.adapter.image_token_id
        embeds = call["inputs_embeds"]
        table = self.adapter.model.get_input_embeddings()
        placeholder = table(torch.tensor(self.adapter.image_token_id, device=table.weight.device)).to(embeds.device)
        return (embeds == placeholder).all(-1)

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        # runs after an exception too, so that a failed call leaves nothing behind
        self._prompt, self._pending, self._recordings = None, None, []

    # --- the decoder ------------------------------------------------------------------------------------------------

    def _before_decoder(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        before, prompt = pruned_prompt(cache), self._prompt
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            return None
        past = cache.get_seq_length() if cache is not None else 0
        if prompt is None and past == 0:
            self.last = Prompt(Layout((), embeds.shape[0], embeds.shape[1]))
        if prompt is None and before is None:
            return None
        mask = kwargs.get("attention_mask")
        self._check_mask(mask, past + embeds.shape[1])
        if prompt is not None:
            prompt.past = past
            embeds, self._compaction = self._prune(prompt, embeds, mask)
            self.last = prompt
        if self._compaction is None and before is None:
            return None
        return args, {**kwargs, **self._shortened(embeds, mask, kwargs.get("position_ids"), before, past)}

    @staticmethod
    def _check_mask(mask: Any, length: int) -> None:
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"A pruned prompt needs the 2-D attention mask [B, tokens], got {shape}; its 4-D form is made after "
                "the pruning. Static caches, which make it earlier, cannot hold a pruned prompt."
            )
        if mask.shape[1] != length:
            raise ValueError(
                f"The attention mask covers {mask.shape[1]} tokens, but the cache and the new input together have "
                f"{length}. Count every token that the model was given, pruned ones included."
            )

    def _shortened(
        self, embeds: Tensor, mask: Tensor | None, positions: Tensor | None, before: PrunedPrompt | None, past: int
    ) -> dict[str, Any]:
        """Arguments for the decoder: the shortened rows, and the masks and positions that fit them."""
        compaction, policy = self._compaction, self.pruner.positions
        batch_size, length = embeds.shape[:2]
        if positions is None:
            positions = torch.arange(past, past + length, device=embeds.device)[None]
        old_mask = before.mask(mask, past) if before else (None if mask is None else mask[:, :past])
        new_mask = None if mask is None else mask[:, past:]
        if compaction is not None:
            positions = compaction.positions(positions, policy)
            embeds = compaction.rows(embeds)
            new_mask = compaction.real.to(torch.int64 if mask is None else mask.dtype) if compaction.padded else None
        if before is not None and policy == "compact":
            positions = positions - before.removed.to(positions.device)[:, None]
        if compaction is not None:
            self._pending = self._bookkeeping(compaction, before, past, length)
        if mask is None and old_mask is None and new_mask is None:
            return {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": None}
        old_length = past - (before.hidden if before else 0)
        kind = {"device": embeds.device, "dtype": torch.int64 if mask is None else mask.dtype}
        if old_mask is None:
            old_mask = torch.ones(batch_size, old_length, **kind)
        if new_mask is None:
            new_mask = torch.ones(batch_size, embeds.shape[1], **kind)
        return {
            "inputs_embeds": embeds,
            "position_ids": positions,
            "attention_mask": torch.cat([old_mask, new_mask.to(old_mask.device)], dim=1),
        }

    @staticmethod
    def _bookkeeping(compaction: Compaction, before: PrunedPrompt | None, past: int, length: int) -> PrunedPrompt:
        slots = (compaction.index + past).masked_fill(~compaction.real, -1)
        removed, padded = compaction.removed, compaction.padded
        rows = slots.shape[0]
        first = 0
        if before is not None:
            first, removed, padded = before.length, removed + before.removed, padded or before.padded
        earlier = torch.arange(first, past, device=slots.device).expand(rows, -1)
        slots = torch.cat([*([before.slots] if before is not None else []), earlier, slots], dim=1)
        return PrunedPrompt(slots, past + length, removed, padded)

    def _after_decoder(self, module: Any, args: Any, output: Any) -> None:
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            mark_pruned(cache, pending)

    # --- selection --------------------------------------------------------------------------------------------------

    def _prune(self, prompt: Prompt, embeds: Tensor, mask: Tensor | None) -> tuple[Tensor, Compaction | None]:
        layout = prompt.layout
        if not prompt.sources:
            prompt.sources = [(recording, row) for recording in self._recordings for row in range(len(recording.grids))]
        prompt.watch = self.watch
        prompt.kept = [None] * len(layout.spans)
        prompt.lengths_kept = list(prompt.lengths)
        if prompt.sources:
            prompt.tower_grid = prompt.sources[0][0].tower_grid
        keep: Tensor | None = None
        device = embeds.device
        for grid, members in layout.groups().items():
            num_tokens = grid[0] * grid[1]
            if self.budget.tokens(num_tokens) >= num_tokens:
                continue
            spans = [layout.spans[member] for member in members]
            rows = torch.tensor([span.sample for span in spans], device=device)[:, None]
            starts = torch.tensor([span.start for span in spans], device=device)[:, None]
            places = starts + torch.arange(num_tokens, device=device)  # [M, N]
            with prompt.watch.running(device):
                selection = self._select(prompt, members, grid, embeds[rows, places])
            if selection is None:
                continue
            kept_places = starts + selection.indices
            if keep is None:
                keep = torch.ones(embeds.shape[:2], dtype=torch.bool, device=device)
            keep[rows, places] = False
            keep[rows, kept_places] = True
            if selection.features is not None:
                embeds = embeds.index_put((rows, kept_places), selection.features.to(embeds.dtype))
            for member, span, indices in zip(members, spans, selection.indices):
                prompt.kept[member] = indices
                prompt.lengths_kept[span.sample] -= num_tokens - indices.shape[0]
        if keep is None:
            return embeds, None
        attended = None if mask is None else mask[:, -embeds.shape[1] :].to(device=device, dtype=torch.bool)
        # padding on the right shows as a last column that is not all ones; the mask was read when the call began
        pad_left = attended is None or bool(attended[:, -1].all())
        return embeds, plan_compaction(keep, attended, prompt.lengths_kept, pad_left)

    def _select(self, prompt: Prompt, members: list[int], grid: tuple[int, int], features: Tensor) -> Selection | None:
        sources = [prompt.sources[member] for member in members]
        num_images, num_tokens = features.shape[:2]
        if self.pruner.site == "pixels":
            kept = sources[0][0].kept
            if kept is None:
                return None
            return Selection(torch.tensor(kept, device=features.device).expand(num_images, -1))
        recorded = sources[0][0].signals
        view = View(
            features=features,
            grid=grid,
            budget=self.budget.tokens(num_tokens),
            tower=self.adapter.tower,
            signals={
                signal: gather_rows(sources, lambda recording, s=signal: recording.signals[s]).to(features.device)
                for signal in recorded
            },
            hints={name: self._hint(name, sources) for name in self.pruner.hints},
            make_keys=lambda: self._keys(prompt, members, sources).to(features.device),
        )
        return self.pruner.select(view).validate(num_images, num_tokens)

    def _hint(self, name: str, sources: list[tuple[Recording, int]]) -> list[Any]:
        if name not in self.hints:
            raise ValueError(
                f"Method {self.pruner.name!r} needs {name!r} of each image: call handle.set_hints({name}=[...]) first."
            )
        values = self.hints[name]
        rows = [row for _, row in sources]
        if max(rows) >= len(values):
            raise ValueError(f"set_hints({name}=...) gave {len(values)} value(s) for {max(rows) + 1} images or more.")
        return [values[row] for row in rows]

    @staticmethod
    def _keys(prompt: Prompt, members: list[int], sources: list[tuple[Recording, int]]) -> Tensor:
        pixels = gather_rows(sources, lambda recording: recording.pixel_keys())
        places = [prompt.layout.spans[member].image for member in members]
        return pixels + torch.tensor(places, device=pixels.device) * 0x9E3779B1
