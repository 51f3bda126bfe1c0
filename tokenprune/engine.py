"""The one engine: it finds the visual tokens of a prompt, lets a method choose, and shortens what the decoder is given.

It works through public seams of stock models: hooks on the module that merges text and images (`entry`), on the decoder
stack and its layers, on the vision blocks whose signals were asked for, and a wrapper of the features calls on that one
object. It knows neither a family's name nor a method's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters._base import Adapter
from tokenprune.asking import RowChooser
from tokenprune.attending import Attending
from tokenprune.cache import mark_pruned, pruned_prompt
from tokenprune.compaction import Compaction
from tokenprune.decoder_signals import DecoderSignals, LayerInput, check_decoder_signal
from tokenprune.decoding import DecoderPass
from tokenprune.drafts import Drafts
from tokenprune.intervention import Intervention
from tokenprune.layout import Layout, build_layout
from tokenprune.ledger import Ledger
from tokenprune.opaque import opaque
from tokenprune.prompt import Cutter, Prompt
from tokenprune.recording import Recording, sources_of
from tokenprune.seams import cache_in, cache_of
from tokenprune.signals import DECODER_SIGNALS
from tokenprune.stages import Stage, check_vision_signal
from tokenprune.tower import TowerWatch
from tokenprune.training import LossAfterPruning
from tokenprune.transitions import Transitions


class Engine:
    """Runs the stages of one method on one model.

    Args:
        adapter: the model's family.
        stages: in the order in which they run, see `check_plan`.
        interventions: what changes attention in the decoder.
    """

    def __init__(self, adapter: Adapter, stages: Sequence[Stage], interventions: Sequence[Intervention] = ()) -> None:
        self.adapter = adapter
        self.stages = tuple(stages)
        self.hints: dict[str, list[Any]] = {}
        self.last: Prompt | None = None
        self.attending = Attending(adapter, interventions, [s.depth for s in stages if s.place == "layer"])
        self._input = next((stage for stage in stages if stage.place == "input"), None)
        # tokens that left before the projector leave the rows here too, under their own method's policy
        self._first_cut = self._input or next((stage for stage in stages if stage.place != "layer"), None)
        self._layers = {stage.depth: stage for stage in stages if stage.place == "layer"}
        signals = [signal for stage in stages for signal in stage.signals(adapter.tower)]
        for stage in stages:
            for signal in stage.signals(adapter.tower):
                check_decoder_signal(signal, stage.site, stage.depth if stage.place == "layer" else -2)
                check_vision_signal(signal, stage, adapter.tower.feature_layer)
        self._tower = TowerWatch(adapter, stages, tuple(dict.fromkeys(signals)), self._tower_hint)
        self._read_layers = {signal.layer for signal in signals if signal.name in DECODER_SIGNALS}
        self._read_after = {stage.depth - 1: stage for stage in stages if _reads_before(stage, adapter.tower)}
        self._transitions = Transitions(adapter, signals, self._now)
        self._drafts = Drafts()
        self._rows = RowChooser(adapter.tower, self._transitions, self.attending, self._hint)
        self._prompt: Prompt | None = None
        self._pass: DecoderPass | None = None
        self._entered: dict[int, LayerInput] = {}
        self._read: dict[int, DecoderSignals] = {}
        self._compaction: Compaction | None = None
        self._served: Any = None
        self._window = _window(adapter.language_model.config)
        self._cut_site = next((stage.site for stage in reversed(stages) if stage.place != "layer"), "input")
        self._parameters = list(inspect.signature(adapter.entry.forward).parameters)

    def install(self, ledger: Ledger) -> None:
        """Place every hook; `ledger` takes them away."""
        adapter = self.adapter
        ledger.hook(adapter.entry.register_forward_pre_hook(opaque(self._enter), with_kwargs=True))
        ledger.hook(adapter.entry.register_forward_hook(opaque(self._leave), always_call=True))
        decoder = adapter.language_model
        ledger.hook(decoder.register_forward_pre_hook(opaque(self._before_decoder), with_kwargs=True))
        ledger.hook(decoder.register_forward_hook(opaque(self._after_decoder)))
        self.attending.install(ledger)
        self._ledger, self._hooked = ledger, len(adapter.layers)
        if self._layers:
            self._hook_layers(min({*self._layers, *self._read_layers}))
        for layer in self._read_after:
            hook = opaque(functools.partial(self._after_attention, layer))
            # first, while what shards or offloads weights still has those of this layer here
            ledger.hook(adapter.attention(adapter.layers[layer]).register_forward_hook(hook, prepend=True))
        LossAfterPruning(lambda: self._compaction).install(adapter.model, ledger)
        self._tower.install(ledger)
        self._drafts.install(adapter.model, ledger)
        self._transitions.install(ledger)

    def _hook_layers(self, first: int) -> None:
        """Watch all decoder layers from `first` on."""
        for layer in range(first, self._hooked):
            hook = opaque(functools.partial(self._enter_layer, layer))
            self._ledger.hook(self.adapter.layers[layer].register_forward_pre_hook(hook, with_kwargs=True))
        self._hooked = min(self._hooked, first)

    # --- the prompt -------------------------------------------------------------------------------------------------

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forget()
        self._tower.within = True
        self._compaction = None
        call = {**dict(zip(self._parameters, args)), **kwargs}
        encoded = call.get("mm_encoder_outputs") or {}
        adapter = self.adapter
        given = {
            kind: encoded.get(kind) is not None or call.get(adapter.pixels[kind]) is not None
            for kind in adapter.features
        }
        if not any(given.values()):
            return
        if getattr(cache_of(call), "is_compileable", False):
            raise ValueError(
                "A static cache has one fixed length for all layers and rows, so it cannot hold a pruned prompt, and "
                "its keys cannot be kept track of. "
                "Use the default dynamic cache (leave cache_implementation and past_key_values alone)."
            )
        sources: dict[str, list[tuple[Recording, int]]] = {}
        visuals = {}
        for kind in adapter.features:
            if encoded.get(kind) is not None:
                sources[kind] = self._sources(encoded[kind])
                visuals[kind] = [recording.visuals[row] for recording, row in sources[kind]]
            elif given[kind]:
                visuals[kind] = adapter.visuals(kind, call)
        layout = build_layout(self._placeholders(call), visuals)
        prompt = Prompt(layout)
        if sources:
            prompt.sources = [sources[span.visual.kind][o] for span, o in zip(layout.spans, layout.order)]
        mask = call.get("attention_mask")
        prompt.lengths = [layout.length] * layout.batch_size
        if isinstance(mask, Tensor) and mask.dim() == 2:
            own = mask[:, -layout.length :].cpu()
            prompt.attended = own.to(torch.bool)
            prompt.lengths = prompt.attended.sum(1).tolist()
            self._check_attended(layout, prompt.attended)
            # padding on the right shows as a last column that is not all ones
            prompt.pad_left = bool(prompt.attended[:, -1].all())
        self._prompt = prompt

    @staticmethod
    def _check_attended(layout: Layout, attended: Tensor) -> None:
        for span in layout.spans:
            hidden = int((~attended[span.sample, span.places]).sum())
            if hidden:
                raise ValueError(
                    f"The attention mask hides {hidden} of the {len(span.places)} visual tokens of a picture in row "
                    f"{span.sample}; a method would choose among tokens that nothing attends to. Mask padding only, or "
                    "leave the picture out of the prompt."
                )

    @staticmethod
    def _sources(encoded: Any) -> list[tuple[Recording, int]]:
        found = sources_of(encoded)
        if found is None:
            raise ValueError(
                "mm_encoder_outputs holds image features that were computed before tokenprune was applied to the "
                "model, or that were cut up since (prefill_chunk_size does that). Compute them again, pass "
                "pixel_values, or leave the prompt in one piece."
            )
        return found

    def _placeholders(self, call: dict[str, Any]) -> dict[str, Tensor]:
        ids = {kind: number for kind, number in self.adapter.placeholder_ids.items() if kind in self.adapter.features}
        input_ids = call.get("input_ids")
        if input_ids is not None:
            on_host = input_ids.cpu()
            return {kind: on_host == number for kind, number in ids.items()}
        embeds = call["inputs_embeds"]
        table = self.adapter.model.get_input_embeddings()
        found = {}
        for kind, number in ids.items():
            # weights that accelerate brings when they are needed are on the meta device now
            device = embeds.device if table.weight.is_meta else table.weight.device
            one = table(torch.tensor(number, device=device)).to(embeds.device)
            found[kind] = (embeds == one).all(-1).cpu()
        return found

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        # runs after an exception too, so that a failed call leaves nothing behind
        self._forget()

    def _forget(self) -> None:
        if self._prompt is not None:
            self._prompt.sources = []  # pixels and signals; what reports need was written down
        self._prompt, self._pass, self._entered, self._read = None, None, {}, {}
        self._serve(None)
        self._tower.forget()
        self._transitions.forget()
        self.attending.forget()

    def _serve(self, cache: Any) -> None:
        """Let the pruned `cache` take keys until this is called again."""
        if self._served is not None:
            self._served.tokenprune_served = False
        if cache is not None:
            cache.tokenprune_served = True
        self._served = cache

    def _now(self) -> tuple[Prompt, Tensor | None] | None:
        return None if self._prompt is None or self._pass is None else (self._prompt, self._pass.attended)

    # --- the decoder ------------------------------------------------------------------------------------------------

    def _before_decoder(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = cache_of(kwargs)
        before, prompt = pruned_prompt(cache), self._prompt
        embeds = kwargs.get("inputs_embeds")
        self._pass = None
        if embeds is None:
            return None
        past = cache.get_seq_length() if cache is not None else 0
        if prompt is None and past == 0:
            self.last = Prompt(Layout((), embeds.shape[0], embeds.shape[1]))
        mask = kwargs.get("attention_mask")
        if prompt is not None:
            prompt.drafted = self._drafts.proposed(past + embeds.shape[1])
        self.attending.begin(cache, past, prompt, embeds, mask)
        if prompt is None and before is None:
            return None
        if before is not None and len(before.segments) > 1:  # another method cut it inside the decoder
            self._hook_layers(before.segments[1].first_layer)
        self._check_mask(mask, past + embeds.shape[1])
        self._check_window(past + embeds.shape[1])
        self._serve(None if before is None else cache)
        compaction = None
        if prompt is not None:
            embeds, compaction = self._cut_input(prompt, embeds, mask)
            self.last = prompt
            if compaction is not None:
                self.attending.cut(compaction)
        if compaction is None and before is None and not self._layers:
            return None
        current = DecoderPass(self.adapter, before, past, embeds.shape[0], embeds.shape[1], embeds.device)
        policy = self._policy(self._first_cut)
        changed = current.begin(compaction, policy, embeds, mask, kwargs.get("position_ids"))
        self._compaction, self._pass = compaction, current
        changed |= self._beside(kwargs, compaction)
        return args, {**kwargs, **changed}

    @staticmethod
    def _policy(stage: Stage | None) -> str:
        return "keep" if stage is None else str(stage.pruner.positions)

    def _beside(self, kwargs: dict[str, Any], compaction: Compaction | None) -> dict[str, Any]:
        """What else the decoder is handed by place (visual features that are added inside it)."""
        if compaction is None:
            return {}
        return self.adapter.beside(kwargs, compaction.rows, compaction.real)

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

    def _after_decoder(self, module: Any, args: Any, output: Any) -> None:
        current, self._pass = self._pass, None
        self._serve(None)
        cache = cache_in(output)
        self.attending.finish(cache)
        if current is None:
            return
        after = current.result()
        if after is not None and cache is not None:
            mark_pruned(cache, after)

    # --- cuts -------------------------------------------------------------------------------------------------------

    def _cut_input(self, prompt: Prompt, embeds: Tensor, mask: Tensor | None) -> tuple[Tensor, Compaction | None]:
        if not prompt.sources:
            prompt.sources = self._recorded(prompt.layout)
        for recording in prompt.recordings:
            prompt.watch.join(recording.watch)
            prompt.flops += recording.selection_flops
            prompt.tower.append(recording.work())
        prompt.place(embeds.device)
        cutter = Cutter(prompt, self._cut_site, embeds.shape[1])
        for index, (recording, row) in enumerate(prompt.sources):
            left = recording.kept[row]
            if left is not None and left.count < prompt.layout.spans[index].num_tokens:
                cutter.keep(index, left.tokens.to(embeds.device), {})
                carry = left.carry
                prompt.alive[index].carry = {name: values.to(embeds.device) for name, values in carry.items()}
        if self._input is not None:
            with prompt.watch.running(embeds.device):
                embeds = self._rows.choose(self._input, prompt, cutter, embeds, None)
        attended = None if mask is None else mask[:, -embeds.shape[1] :].to(device=embeds.device, dtype=torch.bool)
        return embeds, cutter.compact(attended, embeds.shape[0])

    def _recorded(self, layout: Layout) -> list[tuple[Recording, int]]:
        """Recording and row of each span, from the features calls of this very forward."""
        by_kind = {
            kind: [(recording, row) for recording in recordings for row in range(len(recording.visuals))]
            for kind, recordings in self._tower.recordings.items()
        }
        return [by_kind[span.visual.kind][order] for span, order in zip(layout.spans, layout.order)]

    def _hint(self, name: str, row: int) -> object:
        if name not in self.hints:
            method = next((s.pruner.name for s in self.stages if name in s.pruner.hints), "")
            raise ValueError(
                f"Method {method!r} needs {name!r} of each image: call handle.set_hints({name}=[...]) first."
            )
        values = self.hints[name]
        if row >= len(values):
            raise ValueError(f"set_hints({name}=...) gave {len(values)} value(s) for {row + 1} images or more.")
        return values[row]

    def _tower_hint(self, name: str, kind: str, place: int, count: int) -> object:
        """The hint of a visual that the tower counts apart from those of other kinds: number `place` of `count`."""
        if self._prompt is not None:
            layout = self._prompt.layout
            seen = dict.fromkeys((span.visual.kind, order) for span, order in zip(layout.spans, layout.order))
            return self._hint(name, list(seen).index((kind, place)))
        given = len(self.hints.get(name, ()))
        if len(self.adapter.features) > 1 and given not in (0, count):
            raise ValueError(
                f"set_hints({name}=...) gave {given} values, and the vision tower runs on {count} visuals of kind "
                f"{kind!r} before the prompt is known, so it cannot tell whose they are. Put pictures and videos into "
                "different batches, or cut at 'input'."
            )
        return self._hint(name, place)

    # --- a decoder layer --------------------------------------------------------------------------------------------

    def _enter_layer(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        current, prompt = self._pass, self._prompt
        if current is None:
            return None
        positional = bool(args)
        hidden = args[0] if positional else kwargs["hidden_states"]
        stage = self._layers.get(layer) if prompt is not None else None
        reads = prompt is not None and layer in self._read_layers
        if reads and stage is not None:  # what this layer would do, for the stage before it
            fitted = current.arguments(layer, hidden, kwargs) if current.differs(layer) else kwargs
            self._entered[layer] = self._layer_input(layer, module, hidden, fitted, current)
        if stage is not None and prompt is not None:
            with prompt.watch.running(hidden.device):
                hidden = self._cut_layer(stage, prompt, current, hidden)
        differs = current.differs(layer)
        if differs:
            kwargs = current.arguments(layer, hidden, kwargs)
        if reads:  # what it does, for the stage after it
            self._entered[layer] = self._layer_input(layer, module, hidden, kwargs, current)
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
        prompt, given, stage = self._prompt, self._entered.pop(layer, None), self._read_after[layer]
        if prompt is None or given is None:
            return
        self._read[layer] = signals = DecoderSignals(self.adapter, given.after(layer), prompt)
        budgets = [stage.budget.tokens(span.num_tokens) for span in prompt.layout.spans]
        cuts = [0 < budget < alive.count for budget, alive in zip(budgets, prompt.alive)]
        if any(cuts) or (stage.pruner.adaptive and any(alive.count for alive in prompt.alive)):
            with prompt.watch.running(given.hidden.device):
                wanted = stage.signals(self.adapter.tower)
                signals.prepare([signal.name for signal in wanted if signal.layer == layer])

    def _cut_layer(self, stage: Stage, prompt: Prompt, current: DecoderPass, hidden: Tensor) -> Tensor:
        wanted = stage.signals(self.adapter.tower)
        signals = {}
        for layer in {signal.layer for signal in wanted if signal.name in DECODER_SIGNALS}:
            ran = layer < stage.depth
            signals[layer] = self._read[layer] if ran else DecoderSignals(self.adapter, self._entered[layer], prompt)
        cutter = Cutter(prompt, stage.site, hidden.shape[1])
        hidden = self._rows.choose(stage, prompt, cutter, hidden, signals)
        prompt.flops += sum(computed.flops for computed in signals.values())
        compaction = cutter.compact(current.attended, hidden.shape[0])
        if compaction is None:
            return hidden
        current.cut(stage.depth, compaction, self._policy(stage))
        self._transitions.move(compaction)
        self.attending.cut(compaction, stage.depth)
        self._compaction = current.compaction
        return compaction.rows(hidden)


def _reads_before(stage: Stage, tower: Any) -> bool:
    """Whether a stage asks for what the layer before its cut did."""
    wanted = stage.signals(tower) if stage.place == "layer" else ()
    return any(signal.name in DECODER_SIGNALS and signal.layer < stage.depth for signal in wanted)


def _window(config: Any) -> int | None:
    """How many tokens the layers of a decoder see, where some do not see all."""
    kinds = getattr(config, "layer_types", None)
    active = kinds is None or any(kind == "sliding_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) if active else None
