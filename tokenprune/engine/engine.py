"""The one engine: it finds the visual tokens of a prompt, lets a method choose, and shortens what the decoder is given.

It works through public seams of stock models: hooks on the module that merges text and images (`entry`), on the decoder
stack and its layers, on the vision blocks whose signals were asked for, and a wrapper of the features calls on that one
object. It knows neither a family's name nor a method's.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.capture.decoder_attention import DecoderSignals, LayerInput, check_decoder_signal
from tokenprune.capture.token_transition import Transitions
from tokenprune.engine.assisted_decoding import Drafts
from tokenprune.engine.attention import AttentionInterventions
from tokenprune.engine.decoder_pass import DecoderPass
from tokenprune.engine.outputs import Outputs, restore, strike_out
from tokenprune.engine.prompt_reader import PromptReader
from tokenprune.engine.prompt_selection import PromptSelector
from tokenprune.engine.vision_tower import TowerHooks
from tokenprune.hooks import Ledger, opaque
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.intervention import Intervention
from tokenprune.interfaces.pruner import Stage
from tokenprune.interfaces.signals import DECODER_SIGNALS, TRANSITION_SIGNALS
from tokenprune.plan.checks import check_vision_signal
from tokenprune.seams import cache_in, cache_of
from tokenprune.state.compaction import Compaction
from tokenprune.state.forward_call import Calls, ForwardCall, Generation
from tokenprune.state.kv_cache import mark_pruned, pruned_prompt
from tokenprune.state.prompt_layout import Layout
from tokenprune.state.prompt_state import CutBuilder, Prompt
from tokenprune.state.tower_recording import Recording
from tokenprune.wrappers import Links, drop_graphs


class Engine:
    """Runs the stages of one method on one model.

    Args:
        adapter: the model's family.
        stages: in the order in which they run, see `check_plan`.
        interventions: what changes attention in the decoder.
        outputs: "auto", "full" or "kept", see `Outputs`.
    """

    def __init__(
        self,
        adapter: Adapter,
        stages: Sequence[Stage],
        interventions: Sequence[Intervention] = (),
        outputs: str = "auto",
    ) -> None:
        self.adapter = adapter
        self.stages = tuple(stages)
        self.hints: dict[str, list[Any]] = {}  # of threads that gave none of their own
        self.last: Prompt | None = None
        self.calls = Calls()
        cuts = [stage.depth for stage in stages if stage.place == "layer"]
        self.attending = AttentionInterventions(adapter, interventions, self.calls, cuts)
        self._input = next((stage for stage in stages if stage.place == "input"), None)
        # tokens that left before the projector leave the rows here too, under their own method's policy
        self._first_cut = self._input or next((stage for stage in stages if stage.place != "layer"), None)
        self._layers = {stage.depth: stage for stage in stages if stage.place == "layer"}
        signals = [signal for stage in stages for signal in stage.signals(adapter.tower)]
        for stage in stages:
            for signal in stage.signals(adapter.tower):
                check_decoder_signal(signal, stage.site, stage.depth if stage.place == "layer" else -2)
                check_vision_signal(signal, stage, adapter.tower.feature_layer)
        self._reader = PromptReader(adapter)
        self._tower = TowerHooks(adapter, stages, tuple(dict.fromkeys(signals)), self._tower_hint, self.calls)
        self._read_layers = {signal.layer for signal in signals if signal.name in DECODER_SIGNALS}
        self._read_after = {stage.depth - 1: stage for stage in stages if _reads_before(stage, adapter.tower)}
        self._text_aware = any(signal.name in (*DECODER_SIGNALS, *TRANSITION_SIGNALS) for signal in signals)
        self._text_aware |= bool(self.attending)
        self._transitions = Transitions(adapter, signals, self.calls)
        self._drafts = Drafts(self.calls)
        self._outputs = Outputs(self.calls, outputs)
        self._rows = PromptSelector(adapter.tower, self._transitions, self.attending, self._hint)
        self._last_of: Generation | None = None  # the `generate` call that `last` is of
        self._learning = threading.RLock()
        self._hooking = threading.Lock()
        self._window = _window(adapter.language_model.config)
        self._cut_site = next((stage.site for stage in reversed(stages) if stage.place != "layer"), "input")
        self._parameters = list(inspect.signature(adapter.entry.forward).parameters)

    def install(self, ledger: Ledger) -> None:
        """Place every hook; `ledger` takes them away."""
        adapter = self.adapter
        drop_graphs(ledger)
        before = _hooks(adapter.model)
        self._outputs.install(adapter.model, ledger)
        ledger.hook(adapter.entry.register_forward_pre_hook(opaque(self._enter), with_kwargs=True))
        ledger.hook(adapter.entry.register_forward_hook(opaque(self._leave), always_call=True))
        decoder = adapter.language_model
        ledger.hook(decoder.register_forward_pre_hook(opaque(self._before_decoder), with_kwargs=True))
        ledger.hook(decoder.register_forward_hook(opaque(self._after_decoder)))
        ledger.hook(decoder.register_forward_hook(opaque(self._leave_decoder), always_call=True))
        self.attending.install(ledger)
        self._ledger, self._hooked = ledger, len(adapter.layers)
        if self._layers:
            self._hook_layers(min({*self._layers, *self._read_layers}))
        for layer in self._read_after:
            hook = opaque(functools.partial(self._after_attention, layer))
            # first, while what shards or offloads weights still has those of this layer here
            ledger.hook(adapter.attention(adapter.layers[layer]).register_forward_hook(hook, prepend=True))
        self._tower.install(ledger)
        self._drafts.install(adapter.model, ledger)
        self._transitions.install(ledger)
        hooked = [module for module, count in _hooks(adapter.model).items() if count != before.get(module)]
        self._links = Links(adapter.model, [*hooked, *adapter.layers, *adapter.vision.blocks, *adapter.vision.exits])

    def _hook_layers(self, first: int) -> None:
        """Watch all decoder layers from `first` on."""
        with self._hooking:
            for layer in range(first, self._hooked):
                hook = opaque(functools.partial(self._enter_layer, layer))
                self._ledger.hook(self.adapter.layers[layer].register_forward_pre_hook(hook, with_kwargs=True))
            self._hooked = min(self._hooked, first)

    # --- a call -----------------------------------------------------------------------------------------------------

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self.adapter.entry:
            raise RuntimeError(
                "A replica of the wrapped model was called (DataParallel makes them), and the method is at work on the "
                "original. Use DistributedDataParallel, one process a device, and apply the method in each."
            )
        arguments = {**dict(zip(self._parameters, args)), **kwargs}
        call = self.calls.now
        if call is None or call.module is not self.adapter.model or call.entered:
            call = self.calls.begin(module)
            call.arguments = arguments
        call.entered, call.drafted = True, self._drafts.proposed(arguments, self._text_aware)
        given = next((arguments[n] for n in ("input_ids", "inputs_embeds") if arguments.get(n) is not None), None)
        if given is not None and given.shape[1] > 1:
            self._links.check()
        self._tower.check_planned(arguments)
        call.prompt = self._reader.read(arguments, call.laid_out)
        if call.prompt is not None:
            call.prompt.drafted = call.drafted
            if self.attending.learns:
                self._learning.acquire()
                call.learning = True

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        # runs after an exception too, so that a failed call leaves nothing behind
        call = self.calls.now
        if call is None or not call.entered:
            return
        if call.prompt is not None:
            call.prompt.sources = []  # pixels and signals; what reports need was written down
        if call.learning:
            self._learning.release()
        self._serve(call, None)
        call.clear()
        self.calls.end(module)

    def _serve(self, call: ForwardCall, cache: Any) -> None:
        """Let the pruned `cache` take keys until this is called again."""
        if call.served is not None:
            call.served.tokenprune_active = False
        if cache is not None:
            cache.tokenprune_active = True
        call.served = cache

    # --- the decoder ------------------------------------------------------------------------------------------------

    def _before_decoder(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        embeds = kwargs.get("inputs_embeds")
        call = self.calls.now or self.calls.begin(module)  # a caller may go on from a cache with the decoder alone
        call.decoder = None
        if embeds is None:
            return None
        cache, prompt = cache_of(kwargs), call.prompt
        before = pruned_prompt(cache)
        past = cache.get_seq_length() if cache is not None else 0
        if prompt is None and past == 0:
            self._remember(Prompt(Layout((), embeds.shape[0], embeds.shape[1])))
        mask = kwargs.get("attention_mask")
        self.attending.begin(cache, past, prompt, embeds, mask)
        if prompt is None and before is None:
            return None
        if before is not None and len(before.segments) > 1:  # another method cut it inside the decoder
            self._hook_layers(before.segments[1].first_layer)
        self._check_mask(mask, past + embeds.shape[1])
        self._check_window(past + embeds.shape[1])
        self._serve(call, None if before is None else cache)
        compaction = None
        if prompt is not None:
            embeds, compaction = self._cut_input(prompt, embeds, mask)
            self._remember(prompt)
            if compaction is not None:
                self.attending.cut(compaction)
        if compaction is None and before is None and not self._layers:
            return None
        current = DecoderPass(self.adapter, before, past, embeds.shape[0], embeds.shape[1], embeds.device)
        policy = self._policy(self._first_cut)
        changed = current.begin(compaction, policy, embeds, mask, kwargs.get("position_ids"))
        call.decoder = current
        changed |= self._beside(kwargs, compaction)
        return args, {**kwargs, **changed}

    def _after_decoder(self, module: Any, args: Any, output: Any) -> None:
        call = self.calls.now
        if call is None:
            return
        current, call.decoder = call.decoder, None
        self._serve(call, None)
        cache = cache_in(output)
        self.attending.finish(cache)
        if current is None:
            return
        after = current.result()
        if after is not None and cache is not None:
            mark_pruned(cache, after)
        if not current.moves:
            return
        if call.labels is not None:
            strike_out(call.labels, current.moves[-1][1])
        if self._outputs.full_length(call, self.adapter.model):
            restore(output, current.moves)

    def _leave_decoder(self, module: Any, args: Any, output: Any) -> None:
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

    @staticmethod
    def _policy(stage: Stage | None) -> str:
        return "keep" if stage is None else str(stage.pruner.positions)

    def _beside(self, kwargs: dict[str, Any], compaction: Compaction | None) -> dict[str, Any]:
        """What else the decoder is handed by place (visual features that are added inside it)."""
        if compaction is None:
            return {}
        return self.adapter.per_token_kwargs(kwargs, compaction.rows, compaction.real)

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

    def _check_window(self, length: int) -> None:
        if self._window is not None and self.stages and length > self._window:
            raise ValueError(
                f"Layers of this decoder see the last {self._window} tokens only, and the prompt with its answer has "
                f"{length}: where tokens leave, others come into that window that the model would not have seen. Keep "
                "prompts shorter, or load a model without a sliding window."
            )

    # --- cuts -------------------------------------------------------------------------------------------------------

    def _cut_input(self, prompt: Prompt, embeds: Tensor, mask: Tensor | None) -> tuple[Tensor, Compaction | None]:
        if not prompt.sources:
            prompt.sources = self._recorded(prompt.layout)
        for recording in prompt.recordings:
            prompt.timer.join(recording.timer)
            prompt.flops += recording.selection_flops
            prompt.tower.append(recording.work())
        prompt.place(embeds.device)
        cutter = CutBuilder(prompt, self._cut_site, embeds.shape[1])
        for index, (recording, row) in enumerate(prompt.sources):
            left = recording.kept[row]
            if left is not None and left.count < prompt.layout.spans[index].num_tokens:
                cutter.keep(index, left.tokens.to(embeds.device), {})
                carry = left.carry
                prompt.alive[index].carry = {name: values.to(embeds.device) for name, values in carry.items()}
        if self._input is not None:
            with prompt.timer.running(embeds.device):
                embeds = self._rows.choose(self._input, prompt, cutter, embeds, None)
        attended = None if mask is None else mask[:, -embeds.shape[1] :].to(device=embeds.device, dtype=torch.bool)
        return embeds, cutter.compact(attended, embeds.shape[0])

    def _recorded(self, layout: Layout) -> list[tuple[Recording, int]]:
        """Recording and row of each span, from the features calls of this very forward."""
        recorded = {} if self.calls.now is None else self.calls.now.recordings
        by_kind = {
            kind: [(recording, row) for recording in recordings for row in range(len(recording.visuals))]
            for kind, recordings in recorded.items()
        }
        return [by_kind[span.visual.kind][order] for span, order in zip(layout.spans, layout.order)]

    def _hint(self, name: str, row: int) -> object:
        hints = self.calls.hints if name in self.calls.hints else self.hints
        if name not in hints:
            method = next((s.pruner.name for s in self.stages if name in s.pruner.hints), "")
            raise ValueError(
                f"Method {method!r} needs {name!r} of each image: call handle.set_hints({name}=[...]) first."
            )
        values = hints[name]
        if row >= len(values):
            raise ValueError(f"set_hints({name}=...) gave {len(values)} value(s) for {row + 1} images or more.")
        return values[row]

    def _tower_hint(self, name: str, kind: str, place: int, count: int) -> object:
        """The hint of a visual that the tower counts apart from those of other kinds: number `place` of `count`."""
        prompt = None if self.calls.now is None else self.calls.now.prompt
        if prompt is not None:
            layout = prompt.layout
            seen = dict.fromkeys((span.visual.kind, order) for span, order in zip(layout.spans, layout.order))
            return self._hint(name, list(seen).index((kind, place)))
        given = len(self.calls.hints.get(name, self.hints.get(name, ())))
        if len(self.adapter.features) > 1 and given not in (0, count):
            raise ValueError(
                f"set_hints({name}=...) gave {given} values, and the vision tower runs on {count} visuals of kind "
                f"{kind!r} before the prompt is known, so it cannot tell whose they are. Put pictures and videos into "
                "different batches, or cut at 'input'."
            )
        return self._hint(name, place)

    # --- a decoder layer --------------------------------------------------------------------------------------------

    def _enter_layer(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.calls.now
        if call is None or call.decoder is None:
            return None
        current, prompt = call.decoder, call.prompt
        positional = bool(args)
        hidden = args[0] if positional else kwargs["hidden_states"]
        stage = self._layers.get(layer) if prompt is not None else None
        reads = prompt is not None and layer in self._read_layers
        if reads and stage is not None:  # what this layer would do, for the stage before it
            fitted = current.arguments(layer, hidden, kwargs) if current.differs(layer) else kwargs
            call.inputs[layer] = self._layer_input(layer, module, hidden, fitted, current)
        if stage is not None and prompt is not None:
            with prompt.timer.running(hidden.device):
                hidden = self._cut_layer(stage, call, prompt, current, hidden)
        differs = current.differs(layer)
        if differs:
            kwargs = current.arguments(layer, hidden, kwargs)
        if reads:  # what it does, for the stage after it
            call.inputs[layer] = self._layer_input(layer, module, hidden, kwargs, current)
        if not differs:
            return None
        if positional:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _layer_input(
        self, layer: int, module: Any, hidden: Tensor, kwargs: dict[str, Any], current: DecoderPass
    ) -> LayerInput:
        cache, keys, seen = cache_of(kwargs), None, None
        if current.past and cache is not None:
            held = current.past - (current.before.hidden(layer) if current.before else 0)
            keys, seen = cache.layers[layer].keys, current.seen(layer)
            if keys.dim() != 4 or keys.shape[2] != held:
                raise ValueError(
                    f"A stage here looks at the attention of decoder layer {layer} to earlier turns, and this cache "
                    f"({type(cache.layers[layer]).__name__}) does not hold their keys as they were. Use the default "
                    "cache, or a method that cuts at 'input'."
                )
        return LayerInput(module, hidden, kwargs["position_embeddings"], current.attended, keys, seen, cache=cache)

    def _after_attention(self, layer: int, module: Any, args: Any, output: Any) -> None:
        """Read for the stage after this layer what that one wants to know, while the layer runs."""
        call = self.calls.now
        if call is None or call.prompt is None or layer not in call.inputs:
            return
        prompt, given, stage = call.prompt, call.inputs.pop(layer), self._read_after[layer]
        call.read[layer] = signals = DecoderSignals(self.adapter, given.after(layer), prompt)
        budgets = [stage.budget.tokens(span.num_tokens) for span in prompt.layout.spans]
        cuts = [0 < budget < alive.count for budget, alive in zip(budgets, prompt.alive)]
        if any(cuts) or (stage.pruner.adaptive and any(alive.count for alive in prompt.alive)):
            with prompt.timer.running(given.hidden.device):
                wanted = stage.signals(self.adapter.tower)
                signals.prepare([signal.name for signal in wanted if signal.layer == layer])

    def _cut_layer(
        self, stage: Stage, call: ForwardCall, prompt: Prompt, current: DecoderPass, hidden: Tensor
    ) -> Tensor:
        wanted = stage.signals(self.adapter.tower)
        signals = {}
        for layer in {signal.layer for signal in wanted if signal.name in DECODER_SIGNALS}:
            ran = layer < stage.depth
            signals[layer] = call.read[layer] if ran else DecoderSignals(self.adapter, call.inputs[layer], prompt)
        cutter = CutBuilder(prompt, stage.site, hidden.shape[1])
        hidden = self._rows.choose(stage, prompt, cutter, hidden, signals)
        prompt.flops += sum(computed.flops for computed in signals.values())
        compaction = cutter.compact(current.attended, hidden.shape[0])
        if compaction is None:
            return hidden
        current.cut(stage.depth, compaction, self._policy(stage))
        self._transitions.move(compaction)
        self.attending.cut(compaction, stage.depth)
        return compaction.rows(hidden)


def _reads_before(stage: Stage, tower: Any) -> bool:
    """Whether a stage asks for what the layer before its cut did."""
    wanted = stage.signals(tower) if stage.place == "layer" else ()
    return any(signal.name in DECODER_SIGNALS and signal.layer < stage.depth for signal in wanted)


def _hooks(model: Any) -> dict[Any, int]:
    """How many hooks each module of a model has."""
    return {module: len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()}


def _window(config: Any) -> int | None:
    """How many tokens the layers of a decoder see, where some do not see all."""
    kinds = getattr(config, "layer_types", None)
    active = kinds is None or any(kind == "sliding_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) if active else None
