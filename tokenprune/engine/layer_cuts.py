"""Stages at `layer:K`: decoder layers are hooked, what stages ask of their attention is read, and rows are cut."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenprune.capture.branch import load_branch
from tokenprune.capture.decoder_attention import DecoderSignals, LayerInput
from tokenprune.capture.token_transition import Transitions
from tokenprune.engine.attention import AttentionInterventions
from tokenprune.engine.decoder_pass import DecoderPass
from tokenprune.engine.guards import check_cached_keys
from tokenprune.engine.prompt_selection import PromptSelector
from tokenprune.engine.whole_masks import seen_by_row
from tokenprune.hooks import Ledger, opaque
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.capability import LAYER_CUTS
from tokenprune.interfaces.pruner import Stage
from tokenprune.interfaces.signals import BRANCH_LOGITS, DECODER_SIGNALS, RATER_ATTENTION
from tokenprune.seams import cache_of
from tokenprune.state.forward_call import Calls, ForwardCall
from tokenprune.state.prompt_state import CutBuilder, Prompt


class LayerCuts:
    """Runs the stages of one method that act inside the decoder.

    Args:
        adapter: the model's family.
        stages: of the method; those at other places are none of its business.
        selector: lets a stage choose.
        transitions: signals of layers, read while they run.
        attending: interventions at work.
        calls: the calls at work.
    """

    def __init__(
        self,
        adapter: Adapter,
        stages: Sequence[Stage],
        selector: PromptSelector,
        transitions: Transitions,
        attending: AttentionInterventions,
        calls: Calls,
    ) -> None:
        self._adapter, self._selector, self._transitions = adapter, selector, transitions
        self._attending, self._calls = attending, calls
        self._stages = {stage.depth: stage for stage in stages if stage.place == "layer"}
        signals = [signal for stage in self._stages.values() for signal in stage.signals(adapter.tower)]
        self._branches = {
            signal: load_branch(adapter, signal.layer, int(signal.settings[0]), signal.source)
            for signal in signals
            if signal.name == BRANCH_LOGITS
        }
        self._read_layers = {signal.layer for signal in signals if signal.name in DECODER_SIGNALS}
        self._rates = any(signal.name == RATER_ATTENTION for signal in signals)
        self._read_after = {stage.depth - 1: stage for stage in stages if _reads_before(stage, adapter.tower)}
        self._ledger = Ledger()  # that of the handle, once installed
        self._hooked_from = len(adapter.layers)
        self._hooking = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._stages)

    def install(self, ledger: Ledger) -> None:
        """Place the hooks; `ledger` takes them away."""
        self._ledger, self._hooked_from = ledger, len(self._adapter.layers)
        if self._stages:
            self.hook_from(0 if self._rates else min({*self._stages, *self._read_layers}))
        for layer in self._read_after:
            hook = opaque(functools.partial(self._after_attention, layer))
            # first, while what shards or offloads weights still has those of this layer here
            attention = self._adapter.attention(self._adapter.layers[layer])
            ledger.hook(attention.register_forward_hook(hook, prepend=True))

    def hook_from(self, first: int) -> None:
        """Hook all decoder layers from `first` on; later calls may begin lower, for a cache that was cut lower."""
        with self._hooking:
            for layer in range(first, self._hooked_from):
                hook = opaque(functools.partial(self._enter_layer, layer))
                self._ledger.hook(self._adapter.layers[layer].register_forward_pre_hook(hook, with_kwargs=True))
            self._hooked_from = min(self._hooked_from, first)

    def _enter_layer(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._calls.now
        if call is None or call.decoder is None:
            return None
        current, prompt = call.decoder, call.prompt
        positional = bool(args)
        hidden = args[0] if positional else kwargs["hidden_states"]  # [B, P, D]
        stage = self._stages.get(layer) if prompt is not None else None
        reads = prompt is not None and layer in self._read_layers
        if self._rates and layer == 0 and prompt is not None:
            with prompt.timer.running(hidden.device):
                given = self._layer_input(layer, module, hidden, kwargs, current)
                signals = DecoderSignals(self._adapter, given, prompt)
                signals.note_raters()
                prompt.flops += signals.flops
        if reads and stage is not None:  # what this layer would do, for the stage before it
            fitted = current.arguments(layer, hidden, kwargs) if current.differs(layer) else kwargs
            call.layer_inputs[layer] = self._layer_input(layer, module, hidden, fitted, current)
        if stage is not None and prompt is not None:
            with prompt.timer.running(hidden.device):
                hidden = self._cut(stage, call, prompt, current, hidden)  # [B, P', D]
        differs = current.differs(layer)
        if differs:
            if positional:
                args, kwargs = args[:1], {**named(module, args[1:]), **kwargs}
            by_place = cut_by_place(self._adapter, current, kwargs)
            kwargs = {**current.arguments(layer, hidden, kwargs), **by_place}
        if reads:  # what it does, for the stage after it
            call.layer_inputs[layer] = self._layer_input(layer, module, hidden, kwargs, current)
        if not differs:
            return None
        if positional:
            return (hidden,), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _layer_input(
        self, layer: int, module: Any, hidden: Tensor, kwargs: dict[str, Any], current: DecoderPass
    ) -> LayerInput:
        cache, keys, seen = cache_of(kwargs), None, None
        if current.past and cache is not None:
            left = 0 if current.before is None else current.before.hidden(layer)
            keys, seen = cache.layers[layer].keys, current.seen(layer)  # [B, Hk, K, d], [B, K]
            check_cached_keys(keys, current.past - left, layer, cache)
        bias = self._attending.bias(layer, 0 if keys is None else keys.shape[2], hidden)
        given = LayerInput(
            module, hidden, kwargs["position_embeddings"], current.attended, keys, seen, cache=cache, bias=bias
        )
        given.sees = seen_by_row(kwargs.get("attention_mask")) if current.made_whole else None
        return given

    def _after_attention(self, layer: int, module: Any, args: Any, output: Any) -> None:
        """Read for the stage after this layer what that one wants to know, while the layer runs."""
        call = self._calls.now
        if call is None or call.prompt is None or layer not in call.layer_inputs:
            return
        prompt, given, stage = call.prompt, call.layer_inputs.pop(layer), self._read_after[layer]
        call.read[layer] = signals = DecoderSignals(self._adapter, given.after(layer), prompt)
        budgets = [stage.budget.tokens(span.num_tokens) for span in prompt.layout.spans]
        cuts = [0 < budget < alive.count for budget, alive in zip(budgets, prompt.alive)]
        if any(cuts) or (stage.pruner.is_adaptive and any(alive.count for alive in prompt.alive)):
            with prompt.timer.running(given.hidden.device):
                wanted = stage.signals(self._adapter.tower)
                signals.prepare([signal.name for signal in wanted if signal.layer == layer])

    def _cut(self, stage: Stage, call: ForwardCall, prompt: Prompt, current: DecoderPass, hidden: Tensor) -> Tensor:
        wanted = stage.signals(self._adapter.tower)
        signals = {}
        for layer in {signal.layer for signal in wanted if signal.name in DECODER_SIGNALS}:
            if layer < stage.depth:  # has run
                signals[layer] = call.read[layer]
            else:
                signals[layer] = DecoderSignals(
                    self._adapter, call.layer_inputs[layer], prompt, self._branches, call.read.get(layer - 1)
                )
        cutter = CutBuilder(prompt, stage.site, hidden.shape[1])
        hidden = self._selector.choose(stage, prompt, cutter, hidden, signals)  # [B, P, D]
        prompt.flops += sum(computed.flops for computed in signals.values())
        compaction = cutter.compact(current.attended, hidden.shape[0])
        if compaction is None:
            return hidden
        current.cut(stage.depth, compaction, str(stage.pruner.positions))
        self._transitions.move(compaction)
        self._attending.cut(compaction, stage.depth)
        return compaction.rows(hidden)  # [B, P', D]


_MOVED = ("hidden_states", "attention_mask", "position_ids", "position_embeddings", "cache_position")


def named(module: Any, args: Sequence[Any]) -> dict[str, Any]:
    """Arguments of a layer behind its hidden states, by name."""
    names = list(inspect.signature(module.forward).parameters)[1:]
    return dict(zip(names, args, strict=False))


def cut_by_place(adapter: Adapter, current: DecoderPass, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What else a layer is handed for each token of the base, for the tokens that are left.

    Raises:
        ValueError: it is handed something of which the adapter does not say that it goes by place.
    """
    index = current.index
    if index is None:
        return {}
    at_input = current.moves[0][1].index.shape[1] if current.moves and current.moves[0][0] == 0 else current.length
    shape = (index.shape[0], at_input)
    found = {}
    for name, value in kwargs.items():
        if name in _MOVED or not isinstance(value, Tensor) or value.shape[:2] != shape:
            continue
        if name not in adapter.layer_by_place:
            raise ValueError(
                f"The layers of {type(adapter.language_model).__name__} are given {name!r} for each token, and what "
                f"that means when tokens leave is not known of {type(adapter.model).__name__}: it has no {LAYER_CUTS}. "
                "Use a method that cuts at 'input' (random, divprune)."
            )
        at = index.to(value.device).view(*index.shape, *[1] * (value.dim() - 2))
        found[name] = value.gather(1, at.expand(-1, -1, *value.shape[2:]))
    return found


def _reads_before(stage: Stage, tower: Any) -> bool:
    """Whether a stage asks for what the layer before its cut did."""
    wanted = stage.signals(tower) if stage.place == "layer" else ()
    return any(signal.name in DECODER_SIGNALS and signal.layer < stage.depth for signal in wanted)
