"""The one engine: it finds the visual tokens of a prompt, lets a method choose, and shortens what the decoder is given.

It works through public seams of stock models: hooks on the module that merges text and images (`entry`), on the decoder
stack and its layers, on the vision blocks whose signals were asked for, and a wrapper of the features calls on that one
object. It knows neither a family's name nor a method's.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenprune.capture.decoder_attention import DecoderSignals
from tokenprune.capture.signal_checks import check_decoder_signal
from tokenprune.capture.token_transition import Transitions
from tokenprune.engine.assisted_decoding import Drafts
from tokenprune.engine.attention import AttentionInterventions
from tokenprune.engine.bypass import LayerBypass
from tokenprune.engine.decoder_pass import DecoderPass
from tokenprune.engine.first_layer import entering
from tokenprune.engine.guards import (
    check_added_inside,
    check_drafts,
    check_emptied,
    check_features,
    check_mask,
    check_places,
    check_replica,
    check_right_padding,
    check_rotation,
    in_pages,
)
from tokenprune.engine.hints import Hints
from tokenprune.engine.layer_cuts import LayerCuts
from tokenprune.engine.outputs import Outputs, restore, strike_out
from tokenprune.engine.prompt_reader import PromptReader, Tiles
from tokenprune.engine.prompt_selection import PromptSelector
from tokenprune.engine.vision_tower import TowerHooks
from tokenprune.engine.whole_masks import WholeMasks, make_masks, reach
from tokenprune.hooks import Ledger, opaque
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.intervention import Intervention
from tokenprune.interfaces.pruner import Stage
from tokenprune.interfaces.signals import DECODER_SIGNALS, PROMPT_SIGNALS, TRANSITION_SIGNALS
from tokenprune.interfaces.visual import Visual
from tokenprune.plan.checks import check_vision_signal
from tokenprune.seams import cache_in
from tokenprune.state.call_inputs import CallInputs
from tokenprune.state.compaction import Compaction
from tokenprune.state.forward_call import Calls, ForwardCall, Generation, Running
from tokenprune.state.kv_cache import mark_pruned, pruned_prompt
from tokenprune.state.prompt_layout import Layout
from tokenprune.state.prompt_state import CutBuilder, Prompt
from tokenprune.state.tower_recording import Recording, joined_sources, rows_of
from tokenprune.wrappers import Links, drop_graphs

_MERGED = ("input_ids", "mm_encoder_outputs")
"""Arguments that have gone into the embeddings of a call, besides its pixels."""


class Engine:
    """Runs the stages of one method on one model.

    Args:
        adapter: the model's family.
        stages: in the order in which they run, see `check_plan`.
        interventions: what changes attention in the decoder.
        outputs: "auto", "full" or "kept", see `Outputs`.
        verify: whether the first prompt of a model whose class has no tests of its own is held against its features.
    """

    def __init__(
        self,
        adapter: Adapter,
        stages: Sequence[Stage],
        interventions: Sequence[Intervention] = (),
        outputs: str = "auto",
        verify: bool = True,
    ) -> None:
        self.adapter, self.stages = adapter, tuple(stages)
        self._unseen = verify and adapter.behind_tower and adapter.features_at_places
        self.last: Prompt | None = None
        self._last_of: Generation | None = None  # the `generate` call that `last` is of
        self.calls = Calls(Running())
        self.hints = Hints(adapter, self.stages, self.calls)
        self.attending = AttentionInterventions(adapter, interventions, self.calls, self.stages)
        self.bypass = LayerBypass(adapter, self.attending.bypasses, self.calls, self.stages, self.attending.changes)
        signals = [signal for stage in stages for signal in stage.signals(adapter.tower)]
        signals += self.attending.signals
        for stage in stages:
            for signal in stage.signals(adapter.tower):
                check_decoder_signal(signal, stage.site, stage.depth if stage.place in ("layer", "input") else -2)
                check_vision_signal(signal, stage, adapter.tower.feature_layer)
        self._input = next((stage for stage in stages if stage.place == "input"), None)
        # tokens that left before the projector leave the rows here too, under their own method's policy
        before_layers = [stage for stage in stages if stage.place != "layer"]
        first_cut = self._input or next(iter(before_layers), None)
        self._policy = "keep" if first_cut is None else str(first_cut.pruner.positions)
        self._cut_site = before_layers[-1].site if before_layers else "input"
        self._reader = PromptReader(adapter)
        self._empties = any(stage.place in ("pixels", "vision") for stage in stages)  # rows of features, for zeros
        self.signals = tuple(dict.fromkeys(signals))  # what cuts and interventions read
        self._tower = TowerHooks(adapter, stages, self.signals, self.hints, self.calls, self._tiles, verify)
        self._transitions = Transitions(adapter, signals, self.calls)
        self._selector = PromptSelector(adapter.tower, self._transitions, self.attending, self.hints)
        self._layers = LayerCuts(adapter, self.stages, self._selector, self._transitions, self.attending, self.calls)
        reads_text = any(signal.name in (*DECODER_SIGNALS, *TRANSITION_SIGNALS, *PROMPT_SIGNALS) for signal in signals)
        self._drafts = Drafts(self.calls, reads_text or bool(self.attending.layers))
        self._outputs = Outputs(self.calls, outputs)
        check_added_inside(adapter, self._input)
        self._learning = threading.RLock()
        self._reach = reach(adapter.language_model.config)
        self._parameters = list(inspect.signature(adapter.entry.forward).parameters)
        self._links = Links(adapter.model, ())  # of the modules that are hooked, once they are

    @property
    def changed_layers(self) -> tuple[int, ...]:
        """Decoder layers that an intervention changes."""
        return (*self.attending.layers, *self.bypass.layers)

    def install(self, ledger: Ledger) -> None:
        """Place every hook; `ledger` takes them away, and they may be placed again later."""
        adapter = self.adapter
        self.last, self._last_of = None, None
        self.hints.clear()
        drop_graphs(ledger)
        before = _hooks(adapter.model)
        self._outputs.install(adapter.model, ledger)
        ledger.hook(adapter.entry.register_forward_pre_hook(opaque(self._enter), with_kwargs=True))
        self.install_decoder(ledger)  # before `_leave`: where the decoder merges, both stand behind one module
        ledger.hook(adapter.entry.register_forward_hook(opaque(self._leave), always_call=True))
        self._tower.install(ledger)
        self._drafts.install(adapter.model, ledger)
        self._transitions.install(ledger)
        hooked = [module for module, count in _hooks(adapter.model).items() if count != before.get(module)]
        self._links = Links(adapter.model, [*hooked, *adapter.layers, *adapter.vision.blocks, *adapter.vision.exits])

    def install_decoder(self, ledger: Ledger) -> None:
        """Place the hooks on the decoder and its layers alone."""
        decoder = self.adapter.language_model
        ledger.hook(decoder.register_forward_pre_hook(opaque(self._before_decoder), with_kwargs=True))
        ledger.hook(decoder.register_forward_hook(opaque(self._after_decoder)))
        ledger.hook(decoder.register_forward_hook(opaque(self._leave_decoder), always_call=True))
        for part in (self.attending, self._layers):
            part.install(ledger)
        if self.bypass:  # behind cuts at its layers, also those that a cache asks for later
            self._layers.hook_from(min(self.bypass.layers))
        self.bypass.install(ledger)

    # --- a call -----------------------------------------------------------------------------------------------------

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check_replica(module, self.adapter)
        inputs = CallInputs({**dict(zip(self._parameters, args)), **kwargs})
        call = self.calls.now
        if call is None or call.module is not self.adapter.model or call.entered:
            call = self.calls.begin(module)
            call.arguments = inputs.arguments
        call.entered, call.mask, call.drafted = True, inputs.mask, self._drafts.proposed(inputs)
        if inputs.length > 1:
            self._links.check()
        self._tower.check_planned(inputs.arguments)
        if pruned_prompt(inputs.cache) is not None:
            self._serve(call, inputs.cache, whole=True)
        if self._reader.brings_pictures(inputs):
            check_drafts(self.adapter, inputs.arguments, call.drafted)
            if self.adapter.behind_tower:
                call.waiting = inputs
            else:
                self._lay_out(call, inputs)
        elif self._empties:
            check_emptied(inputs)
        if self.adapter.entry is not self.adapter.language_model or inputs.ids is None:
            return None
        # the decoder merges text and pictures: that is done before it, so that rows can be cut in between
        given = {**inputs.arguments, "inputs_embeds": self.adapter.merged(inputs.arguments)}
        spent = (*_MERGED, *self.adapter.pixels.values())
        return (), {name: value for name, value in given.items() if name not in spent}

    def _lay_out(self, call: ForwardCall, inputs: CallInputs) -> None:
        """Find the visual tokens of a call that brings pictures; `inputs` are those of the merging module."""
        call.waiting = None
        call.prompt = self._reader.read(inputs, call)
        call.prompt.drafted = call.drafted
        if self.attending.learns:
            self._learning.acquire()
            call.learning = self._learning

    def _tiles(self, kind: str, visuals: Sequence[Visual]) -> Tiles:
        """See `PromptReader.tiles`; of the call at work."""
        now, generation = self.calls.now, self.calls.generation
        entered = now if now is not None and now.entered else None
        return self._reader.tiles(kind, visuals, entered, None if generation is None else generation.ids)

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        # runs after an exception too, so that a failed call leaves nothing behind
        call = self.calls.now
        if call is None or not call.entered:
            return
        if call.prompt is not None:
            call.prompt.sources = []  # pixels and signals; what reports need was written down
        unseen = call.waiting is not None and output is not None
        call.clear()
        self.calls.end(module)
        if unseen:
            raise ValueError(
                f"{type(module).__name__} was given pictures and did not call "
                f"{type(self.adapter.language_model).__name__} with inputs_embeds, so nothing could be taken out of "
                "the prompt: this model has no input cuts."
            )

    def _serve(self, call: ForwardCall, cache: Any, whole: bool = False) -> None:
        """Let the pruned `cache` take keys until this is called again; with `whole`, masks are made for whole rows."""
        if call.served is not None:
            call.served.tokenprune_active = call.served.tokenprune_whole = False
        if cache is not None:
            cache.tokenprune_active, cache.tokenprune_whole = True, whole
        call.served = cache

    # --- the decoder ------------------------------------------------------------------------------------------------

    def _before_decoder(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.calls.now or self.calls.begin(module)  # a caller may go on from a cache with the decoder alone
        inputs, made = _unmade(kwargs, call)
        call.decoder = None
        if inputs.embeds is None or in_pages(inputs, call.prompt, self._changes_rows()):
            return None
        if call.waiting is not None:
            self._lay_out(call, call.waiting)
            self._hold_against_features(call.prompt, self.adapter.rows_seen(kwargs, inputs.embeds))
        self.attending.policies.begin(inputs, call.prompt)
        prompt, before = call.prompt, pruned_prompt(inputs.cache)
        if prompt is None and inputs.past == 0:
            self._remember(Prompt(Layout((), inputs.batch_size, inputs.length)))
        self.attending.begin(inputs, prompt)
        if prompt is None and before is None:
            return None
        if before is not None and len(before.segments) > 1:  # another method cut it inside the decoder
            self._layers.hook_from(before.segments[1].first_layer)
        check_mask(inputs)
        config = self.adapter.language_model.config
        if before is not None:
            check_rotation(config, inputs, before)
        if prompt is not None and self.stages:
            check_places(config, inputs, made)
            check_right_padding(config, inputs, prompt.pad_left, self.calls.generation is not None)
        call.masks = self._whole_masks(call, inputs, made)
        self._serve(call, None if before is None else inputs.cache)
        embeds, compaction = inputs.embeds, None  # [B, S, D]
        if prompt is not None:
            embeds, compaction = self._cut_input(prompt, inputs, kwargs)
            self._remember(prompt)
            if compaction is not None:
                self.attending.cut(compaction)
        if compaction is None and before is None and not self._layers:
            return None
        call.decoder = DecoderPass(self.adapter, before, inputs, call.masks)
        changed = call.decoder.begin(compaction, self._policy, embeds)
        if compaction is not None:  # what else the decoder is handed by place: features that are added inside it
            changed |= self.adapter.per_token_kwargs(kwargs, compaction.rows, compaction.real)
        if self.adapter.added_inside:
            call.decoder.beside = {**kwargs, **changed}
        return args, {**kwargs, **changed}

    def _changes_rows(self) -> str:
        """What is at work beside cuts, and needs to know where the rows of a call begin; "" if nothing."""
        names = [one.name for one in self.attending.interventions]
        return ", ".join(dict.fromkeys([*names, *self.attending.changes.values()]))

    def _whole_masks(self, call: ForwardCall, inputs: CallInputs, made: Any) -> WholeMasks | None:
        """Masks for the whole rows of a call, where the decoder cannot make its own for what is left of them."""
        config, length = self.adapter.language_model.config, inputs.past + inputs.length
        pruned = pruned_prompt(inputs.cache) is not None
        if made is None and self._reach is not None and length > self._reach and (pruned or self.stages):
            if pruned:
                self._serve(call, inputs.cache, whole=True)
            made = make_masks(config, inputs, self._reach)
        return None if made is None else WholeMasks(made, length, "flash" in str(config._attn_implementation))

    def _hold_against_features(self, prompt: Prompt | None, embeds: Tensor) -> None:
        """Check the first prompt that was laid out behind the tower, and let go of its features."""
        if prompt is None:
            return
        if self._unseen:
            check_features(self.adapter, prompt, embeds)
            self._unseen = not prompt.layout.spans
        for recording in prompt.recordings:
            recording.features = []  # the features know their recording: together they would outlive the prompt

    def _after_decoder(self, module: Any, args: Any, output: Any) -> None:
        call = self.calls.now
        if call is None:
            return
        current, call.decoder = call.decoder, None
        self._serve(call, None)
        cache = cache_in(output)
        self.attending.finish(cache)
        after = None if current is None else current.result()
        if after is not None and cache is not None:
            mark_pruned(cache, after)
        self.attending.policies.finish(cache, call.prompt, bool(self._layers))
        if current is None or not current.moves:
            return
        if call.labels:
            strike_out(call.labels, current.moves[-1][1])
        if self._outputs.full_length(call, self.adapter.model):
            restore(output, current.moves)

    def _leave_decoder(self, module: Any, args: Any, output: Any) -> None:
        call = self.calls.now
        if call is not None and not call.entered:  # else `_leave` ends it, also where the decoder is what was called
            self.calls.end(module)

    def _remember(self, prompt: Prompt) -> None:
        """`prompt` is the last one; but text alone, within a `generate` call that had pictures, hides none."""
        for passes in self.calls.passes:
            passes.append(prompt)
        generation, last = self.calls.generation, self.last
        text_alone = not prompt.layout.spans and last is not None and len(last.layout.spans) > 0
        if text_alone and generation is not None and self._last_of is generation:
            return
        self.last, self._last_of = prompt, generation

    # --- the cut at its input ---------------------------------------------------------------------------------------

    def _cut_input(
        self, prompt: Prompt, inputs: CallInputs, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Compaction | None]:
        """Let tokens leave that the tower or the stage at "input" took out; embeddings `[B, S, D]`, merged where the
        method merges, and what shortens them to `[B, P, D]`."""
        embeds = inputs.embeds
        if embeds is None:
            raise ValueError("The decoder was called without inputs_embeds, and a pruned prompt needs them.")
        if not prompt.sources:
            prompt.sources = self._recorded(prompt.layout)
        for recording in prompt.recordings:
            prompt.timer.join(recording.timer)
            prompt.flops += recording.selection_flops
            prompt.tower.append(recording.work())
            prompt.merged += recording.merged
        prompt.place(embeds.device)
        cutter = CutBuilder(prompt, self._cut_site, inputs.length)
        for index, (recording, row) in enumerate(prompt.sources):
            left = recording.kept[row]
            if left is not None and left.count < prompt.layout.spans[index].num_tokens:
                sizes = None if left.sizes is None else left.sizes.to(embeds.device)
                cutter.keep(index, left.tokens.to(embeds.device), {}, sizes)
                carry = left.carry
                prompt.alive[index].carry = {name: values.to(embeds.device) for name, values in carry.items()}
        if self._input is not None:
            with prompt.timer.running(embeds.device):
                signals = self._read_first_layer(prompt, inputs, embeds, cutter)
                shown = self.adapter.rows_seen(kwargs, embeds)
                shown = self._selector.choose(self._input, prompt, cutter, shown, signals)
                embeds = embeds if self.adapter.added_inside else shown
                prompt.flops += sum(computed.flops for computed in signals.values())
        return embeds, cutter.compact(inputs.attended(embeds.device), inputs.batch_size)

    def _read_first_layer(
        self, prompt: Prompt, inputs: CallInputs, embeds: Tensor, cutter: CutBuilder
    ) -> dict[int, DecoderSignals]:
        """What the stage at "input" wants to know of decoder layer 0, yet to run; {} if nothing."""
        if self._input is None or not any(s.name in DECODER_SIGNALS for s in self._input.signals(self.adapter.tower)):
            return {}
        masks = None if self.calls.now is None else self.calls.now.masks
        given = entering(self.adapter, inputs, embeds, cutter.gone(embeds.shape[0]), self._policy, masks)
        return {0: DecoderSignals(self.adapter, given, prompt)}

    def _recorded(self, layout: Layout) -> list[tuple[Recording, int]]:
        """Recording and row of each span, from the features calls of this very forward."""
        recorded = {} if self.calls.now is None else self.calls.now.recordings
        by_kind = {
            kind: joined_sources(rows_of(recordings), layout.tiles.get(kind)) for kind, recordings in recorded.items()
        }
        return [by_kind[span.visual.kind][order] for span, order in zip(layout.spans, layout.order)]


def _unmade(kwargs: dict[str, Any], call: ForwardCall) -> tuple[CallInputs, Any]:
    """What the decoder was given, with the 2-D mask of the call where masks were made of that before; and those."""
    mask = kwargs.get("attention_mask")
    given = call.mask if call.entered else mask
    made = isinstance(mask, Mapping) or (isinstance(mask, Tensor) and mask.dim() == 4)
    if not made or given is mask or not (given is None or (isinstance(given, Tensor) and given.dim() == 2)):
        return CallInputs(kwargs), None
    return CallInputs({**kwargs, "attention_mask": given}), mask


def _hooks(model: Any) -> dict[Any, int]:
    """How many hooks each module of a model has."""
    return {module: len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()}
