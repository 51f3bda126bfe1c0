"""Interventions at work on a model: they note facts on keys as a prompt passes, and replace attention output of rows.

The attention modules in which an intervention acts, those of this one model object, get a copy of their config that
names a private attention function; masks are made from the decoder's own config, which stays as it is. The function
calls whatever the model would have called, and hands chosen rows to the intervention. The same function adds the bias
of keys that stand for several merged tokens, see `tokenprune.state.key_bias`.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.engine.cache_policies import CachePolicies
from tokenprune.engine.key_bias import KeyBias, check_wider
from tokenprune.engine.key_facts import AttentionCall, KeyFacts, Rows
from tokenprune.engine.query_rows import put, seen_keys, take
from tokenprune.engine.whole_masks import RECURRENT
from tokenprune.hooks import Ledger, opaque
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.bypass import Bypass
from tokenprune.interfaces.cache_policy import CachePolicy
from tokenprune.interfaces.intervention import Attended, DecoderInfo, Facts, Intervention
from tokenprune.interfaces.pruner import Stage
from tokenprune.interfaces.signals import VISION_SIGNALS, Signal
from tokenprune.state.call_inputs import CallInputs
from tokenprune.state.compaction import Compaction
from tokenprune.state.forward_call import Calls
from tokenprune.state.key_bias import biased_key, biased_query, biased_value
from tokenprune.state.kv_cache import KeyAnnotations, key_facts, mark_facts
from tokenprune.state.prompt_state import Prompt
from tokenprune.wrappers import AsConfigured, runs_again, unwrap


class AttentionInterventions:
    """Runs interventions on one model.

    Args:
        adapter: the model's family.
        interventions: objects of this model alone.
        calls: the calls at work.
        stages: beside them; keys of what they merge may be biased.

    Raises:
        ValueError: two act in one layer, a layer's attention cannot be reached, or an option has nothing to act on.
    """

    def __init__(
        self, adapter: Adapter, interventions: Sequence[Intervention], calls: Calls, stages: Sequence[Stage] = ()
    ) -> None:
        self.adapter, self.interventions, self._calls = adapter, tuple(interventions), calls
        config, decoder = adapter.language_model.config, decoder_info(adapter)
        kind = str(getattr(config, "_attn_implementation", None) or "eager")
        cuts = [stage.depth for stage in stages if stage.place == "layer"]
        self.layers: dict[int, int] = {}  # which intervention acts in which layer
        self.bypasses: list[tuple[Bypass, tuple[int, ...]]] = []  # and those that change no attention
        policies: list[tuple[CachePolicy, tuple[int, ...]]] = []
        for number, one in enumerate(self.interventions):
            layers = one.prepare(decoder)
            if layers:
                one.check_cuts(layers, cuts)
                if one.widens_heads:
                    check_wider(config, kind, one.name, "use another intervention")
            if isinstance(one, Bypass):
                self.bypasses.append((one, layers))
                continue
            if isinstance(one, CachePolicy):
                policies.append((one, layers))
                continue
            for layer in layers:
                if layer in self.layers:
                    other = self.interventions[self.layers[layer]].name
                    raise ValueError(
                        f"{other} and {one.name} both act in decoder layer {layer}; one layer takes one intervention. "
                        "Give each its own layers=[...]."
                    )
                self.layers[layer] = number
        self.signals = self._signals_of_tower(stages)  # what they read of the vision tower
        self._facts = KeyFacts(self.interventions, self.layers)
        self._bias = KeyBias(stages, config, len(adapter.layers), kind)
        named = {layer: self.interventions[number].name for layer, number in self.layers.items()}
        changed = {**self._bias.layers, **named}
        self.policies = CachePolicies(adapter, policies, calls, changed)
        self._check_kinds()
        if (self.layers or self.policies) and any(word in kind for word in ("flex", "paged")):
            raise ValueError(
                f"Interventions read the mask of a layer, and {kind!r} has none that can be read. Load the model with "
                "attn_implementation='sdpa', 'eager' or a flash attention."
            )
        self._places: dict[Any, int] = {
            unwrap(adapter.attention(adapter.layers[layer])): layer
            for layer in sorted({*self.layers, *self._bias.layers, *self.policies.layers})
        }
        self._stock: dict[int, tuple[Any, Any]] = {}  # the layer's own config, and its eager function
        self._run_again: set[int] = set()  # layers in which checkpoint wrappers run attention a second time
        self._interfaces: Any = None

    def _check_kinds(self) -> None:
        """Raise where an intervention acts in layers that go along the row, which have no attention."""
        kinds = [*map(self.adapter.layer_kind, range(len(self.adapter.layers)))]
        acts = {layer: self.interventions[number].name for layer, number in self.layers.items()}
        for layer, name in (acts | {layer: one.name for one, layers in self.bypasses for layer in layers}).items():
            if kinds[layer] in RECURRENT:
                whole = [number for number, kind in enumerate(kinds) if kind not in RECURRENT]
                raise ValueError(
                    f"{name} acts in decoder layer {layer} of {type(self.adapter.model).__name__}, a layer of the kind "
                    f"{kinds[layer]}, which has no attention. Name layers that have: layers={whole} or some of them."
                )

    def _signals_of_tower(self, stages: Sequence[Stage]) -> tuple[Signal, ...]:
        found: list[Signal] = []
        for number, one in enumerate(self.interventions):
            own = one.signals(self.adapter.tower) if number in self.layers.values() else ()
            others = [signal.name for signal in own if signal.name not in VISION_SIGNALS]
            if others:
                raise ValueError(f"{one.name} asks for {others[0]}; an intervention may read the vision tower alone.")
            for stage in stages if own else ():
                if stage.place in ("pixels", "vision"):
                    raise ValueError(
                        f"{one.name} reads whole pictures off the vision tower, and {stage.pruner.name} takes tokens "
                        f"out at {stage.site!r}, before or while it runs. Use a method that cuts at 'input' or "
                        "'layer:K'."
                    )
            found += own
        return tuple(found)

    @property
    def _call(self) -> AttentionCall | None:
        return None if self._calls.now is None else self._calls.now.attention

    @property
    def changes(self) -> dict[int, str]:
        """What changes the attention of a layer, by layer."""
        return {layer: self._who(layer) for layer in sorted(self._places.values())}

    @property
    def learns(self) -> bool:
        """Whether an intervention still learns from the prompts that it sees, so that they must come one by one."""
        return any(one.wants_prompts for one in self.interventions)

    def __bool__(self) -> bool:
        return bool(self._places)

    def _who(self, layer: int) -> str:
        """What acts in a layer, for messages."""
        if self.policies.policy is not None and layer not in self.layers:
            return self.policies.policy.name
        return self.interventions[self.layers[layer]].name if layer in self.layers else self._bias.layers[layer]

    def install(self, ledger: Ledger) -> None:
        """Name the private function in this model's attention modules; `ledger` takes it away."""
        if not self:
            return
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.policies.install(ledger)
        self._interfaces, name = ALL_ATTENTION_FUNCTIONS, f"tokenprune_{id(self):x}"
        ALL_ATTENTION_FUNCTIONS[name] = opaque(_weakly(self))
        ledger.add(lambda: ALL_ATTENTION_FUNCTIONS.pop(name) and None)
        weakref.finalize(self, ALL_ATTENTION_FUNCTIONS.pop, name, None)
        model = self.adapter.model
        self._run_again = {layer for module, layer in self._places.items() if runs_again(model, module)}
        for module, layer in self._places.items():
            eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            if eager is None or not hasattr(module, "config"):
                raise ValueError(
                    f"{type(module).__name__} chooses its attention function in a way that is not known here, so "
                    f"{self._who(layer)} cannot act in it."
                )
            self._stock[layer] = module.config, eager
            renamed = copy.copy(module.config)
            renamed._attn_implementation = name
            ledger.set(module, "config", renamed)
            if layer not in self.layers:
                continue
            hook = opaque(self._enter_layer)
            ledger.hook(self.adapter.layers[layer].register_forward_pre_hook(hook, with_kwargs=True))

    # --- a call of the decoder --------------------------------------------------------------------------------------

    def begin(self, inputs: CallInputs, prompt: Prompt | None) -> None:
        """A call of the decoder begins.

        Args:
            inputs: what the decoder was given, before any cut.
            prompt: of this call, laid out; None without pictures.
        """
        self._bias.check_honoured(inputs.cache)
        if not self or self._calls.now is None or inputs.embeds is None:
            return
        if torch.is_grad_enabled():
            self._check_checkpointing()
        cache, batch_size = inputs.cache, inputs.batch_size
        device = inputs.embeds.device  # that of the weights may be "meta": accelerate brings them when they are needed
        attended = inputs.attended(device) if inputs.length > 1 else None  # [B, S]
        before = key_facts(cache)
        if before is None:
            seen = torch.zeros(batch_size, dtype=torch.bool, device=device)
        else:
            seen = before.visual
        noting = prompt is not None or (inputs.past == 0 and not getattr(cache, "is_compileable", False))
        call = self._calls.now.attention = AttentionCall(before, prompt, noting, inputs.past == 0, seen, attended)
        if prompt is None:
            return
        visual = torch.zeros(batch_size, prompt.layout.length, dtype=torch.bool)
        for span in prompt.layout.spans:
            visual[span.sample, span.places] = True
        real = torch.ones_like(visual) if prompt.attended is None else prompt.attended
        had = seen.cpu() if before is not None else torch.zeros(batch_size, dtype=torch.bool)
        self._facts.plan_rows(call, visual, real, had)
        call.seen = seen | visual.any(1).to(device)

    def _check_checkpointing(self) -> None:
        for layer in self._places.values():
            block = self.adapter.layers[layer]
            if block.training and (getattr(block, "gradient_checkpointing", False) or layer in self._run_again):
                raise ValueError(
                    f"{self._who(layer)} acts in decoder layer {layer}, which gradient "
                    "checkpointing runs a second time, after the prompt is forgotten. Switch gradient checkpointing "
                    f"off, or {'remove the intervention' if layer in self.layers else 'pass key_bias=False'} for "
                    "training."
                )

    def cut(self, compaction: Compaction, layer: int | None = None) -> None:
        """Tokens left: at the input, or before `layer`."""
        if self._call is not None:
            self._call.cut(compaction, layer)

    def kept_out(self, layer: int) -> tuple[Tensor, bool] | None:
        """See `Intervention.kept_out`, for a stage that cuts before `layer`."""
        call = self._call
        if call is None or layer not in call.noted:
            return None
        return self.interventions[self.layers[layer]].kept_out(call.noted[layer])

    def finish(self, cache: Any) -> None:
        """The call is over; facts go with the cache."""
        call = self._call
        if call is None or self._calls.now is None:
            return
        self._calls.now.attention = None
        self._bias.check_reached(call.prompt, call.bias)
        if not call.noting or not (call.joined or call.bias.layers):
            return
        layers = {} if call.before is None else dict(call.before.layers)
        if call.joined:
            applies = torch.stack([facts.applies.to(call.seen.device) for facts in call.joined.values()]).cpu()
            for row, (layer, facts) in zip(applies, call.joined.items()):
                layers[layer] = replace(facts, some=bool(row.any()), every=bool(row.all()))
        if call.prompt is not None and call.joined:
            call.prompt.noted = self.by_intervention({layer: facts.values for layer, facts in layers.items()})
        if cache is not None:
            mark_facts(cache, KeyAnnotations(layers, call.seen, call.bias.layers))

    def by_intervention(self, layers: Mapping[int, Facts]) -> list[dict[int, Facts]]:
        """Facts by layer, for each intervention."""
        facts: list[dict[int, Facts]] = [{} for _ in self.interventions]
        for layer, values in layers.items():
            if layer in self.layers:
                facts[self.layers[layer]][layer] = values
        return facts

    def summaries(self, prompt: Prompt) -> tuple[str, ...]:
        """A line for each intervention: name, layers, what it found in `prompt`."""
        lines = []
        bypassed = {id(one): layers for one, layers in self.bypasses}
        if self.policies.policy is not None:
            bypassed[id(self.policies.policy)] = self.policies.layers
        for number, one in enumerate(self.interventions):
            layers = bypassed.get(id(one)) or [layer for layer, owner in self.layers.items() if owner == number]
            noted = prompt.noted[number] if prompt.noted else {}
            lines.append(f"{one.name}  layers {runs(layers) or 'none'}; {one.summary(noted)}".rstrip("; "))
        return tuple(lines)

    # --- a layer ----------------------------------------------------------------------------------------------------

    def _enter_layer(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._call
        if call is None or not call.noting:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        self._facts.enter(call, self._places[unwrap(self.adapter.attention(module))], hidden)

    def bias(self, layer: int, held: int, new: Tensor) -> Tensor | None:
        """`[B, <= held + P]` fp32, what a layer adds to the logits of its first keys; None: nothing.

        Args:
            layer: which.
            held: keys that were there before the call.
            new: `[B, P, ...]`, of the tokens of the call as they stand.
        """
        call = self._call
        if call is None or layer not in self._bias.layers:
            return None
        before = None if call.before is None else call.before.bias.get(layer)
        return call.bias.of_keys(call.prompt, before, held, new)

    def _attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        layer, width = self._places[module], value.shape[-1]
        held = key.shape[2] - query.shape[2]
        kwargs["scaling"] = kwargs.get("scaling") or query.shape[-1] ** -0.5
        bias = self.bias(layer, held, query.transpose(1, 2)) if self._bias.layers else None
        if bias is not None and self._call is not None:
            self._check_window(layer, held, key, kwargs)
            self._call.bias.layers[layer] = bias
            query, value = biased_query(query), biased_value(value)
            key = biased_key(key, bias, kwargs["scaling"])

        def own() -> tuple[Tensor, Any]:
            return self._changed(module, layer, held, query, key, value, attention_mask, **kwargs)

        if self.policies:
            return self.policies.attended(layer, query, key, value, attention_mask, kwargs["scaling"], own)
        output, weights = own()
        return output[..., :width], weights

    def _check_window(self, layer: int, held: int, key: Tensor, kwargs: Mapping[str, Any]) -> None:
        """Raise once keys may have left the cache of a layer that sees a window: which are left is not followed."""
        if held and (window := kwargs.get("sliding_window")) and key.shape[2] >= window:
            raise ValueError(
                f"{self._who(layer)} knows the keys of decoder layer {layer} by their places, and this layer sees a "
                f"window of {window} tokens, which prompt and answer fill: keys leave its cache. Give it layers=[...] "
                "that see all tokens, or shorter prompts and answers."
            )

    def _changed(
        self,
        module: Any,
        layer: int,
        held: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Attention as the layer's intervention has it, over `held` keys of before the call and its own."""

        def stock(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Any]:
            config, eager = self._stock[layer]
            stock_function = self._interfaces.get_interface(config._attn_implementation, eager)
            asking = module if "flash" not in str(config._attn_implementation) else AsConfigured(module, config)
            return stock_function(asking, query, key, value, attention_mask, **kwargs)

        call = self._call
        if call is None or layer not in self.layers:
            return stock(query, key, value)
        number = self.layers[layer]
        one = self.interventions[number]
        facts = self._facts.of_layer(call, layer, held)
        measures = self._facts.measures(call, layer)
        if not measures and (facts is None or not facts.some):
            return stock(query, key, value)
        if call.prompt is None and call.noting and one.visual_only:
            return stock(query, key, value)
        self._check_window(layer, held, key, kwargs)

        def given(named: Mapping[int, Rows]) -> Attended:
            whole = number not in named
            rows, real = (None, call.attended) if whole else (part.to(query.device) for part in named[number])
            return Attended(
                layer=layer,
                query=query if rows is None else take(query, rows, 2),
                key=key,
                value=value,
                allowed=seen_keys(attention_mask, rows, query.shape[2], key, kwargs.get("sliding_window")),
                scale=kwargs["scaling"],
                facts={} if facts is None else facts.values,
                real=None if real is None else real.to(query.device),
                prompt=call.noting,
                whole=whole,
                places=rows,
                drafted=0 if call.prompt is None else call.prompt.drafted,
                carried=self._facts.carried(call, layer, query.device),
                stock=lambda *changed: stock(*changed)[0].transpose(1, 2),
                made={} if facts is None else facts.made,
            )

        if measures:
            self._facts.measure(call, layer, given(call.measured))
            facts = self._facts.of_layer(call, layer, held)
            if facts is None or not facts.some:
                return stock(query, key, value)
        asked = given(call.rows)
        changed = one.attend(asked)
        if changed is None:
            return stock(query, key, value)
        if call.prompt is not None:
            flops = call.prompt.attention_flops
            flops[layer] = ((flops.get(layer) or 0) if measures else 0) + one.flops(asked)
        if facts is None:
            raise RuntimeError(f"{one.name} changes layer {layer} without facts on its keys.")
        changed, applies = changed.transpose(1, 2), facts.applies[:, None]
        if asked.whole and asked.real is None and facts.every:
            return changed, None
        output, _ = stock(query, key, value)
        if asked.whole:
            # padding keeps what it has: `generate` goes on from the last column, even where it is padding
            applies = applies if asked.real is None else applies & asked.real
            return torch.where(applies[..., None, None], changed, output), None
        # places that stand for no row hold what was there
        rows, real = (part.to(query.device) for part in call.rows[number])
        changed = torch.where((real & applies)[..., None, None], changed, take(output, rows, 1))
        return put(output, rows, real, changed), None


def decoder_info(adapter: Adapter) -> DecoderInfo:
    """What an intervention may know of a model's decoder."""
    config = adapter.language_model.config
    return DecoderInfo(
        adapter.name,
        config.model_type,
        config.hidden_size,
        len(adapter.layers),
        config.num_attention_heads,
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    )


def _weakly(attending: AttentionInterventions) -> Callable[..., tuple[Tensor, Any]]:
    """Its attention function, which a table of transformers can hold without holding the model."""
    reference = weakref.ref(attending)

    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        owner = reference()
        if owner is None:
            raise RuntimeError("An attention module of a model that is gone was called; load the model anew.")
        return owner._attention(*args, **kwargs)

    return attention


def runs(numbers: Sequence[int]) -> str:
    """`[2, 3, 4, 7]` as "2-4, 7"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
