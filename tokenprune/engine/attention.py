"""Interventions at work on a model: they note facts on keys as a prompt passes, and replace attention output of rows.

The attention modules in which an intervention acts, those of this one model object, get a copy of their config that
names a private attention function; masks are made from the decoder's own config, which stays as it is. The function
calls whatever the model would have called, and hands chosen rows to the intervention.
"""

from __future__ import annotations

import copy
import functools
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.hooks import Ledger, opaque
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.intervention import Attended, DecoderInfo, Entering, Facts, Intervention
from tokenprune.state.call_inputs import CallInputs
from tokenprune.state.compaction import Compaction
from tokenprune.state.forward_call import Calls
from tokenprune.state.kv_cache import KeyAnnotations, LayerFacts, key_facts, mark_facts
from tokenprune.state.prompt_state import Prompt
from tokenprune.wrappers import runs_again, unwrap


@dataclass
class _Call:
    """One call of the decoder.

    Attributes:
        before: facts on the cache's keys.
        prompt: None for a call without pictures.
        noting: whether facts are noted on the tokens of this call.
        seen: `[B]` bool, whether the cache holds visual tokens.
        rows: by intervention, `[B, R]` where the rows that it may change stand now, and `[B, R]` whether there is one;
            an intervention that is not here may change all rows.
        attended: `[B, S]` bool, None without padding.
        noted: by layer, facts on the tokens of this call.
        joined: by layer, facts on all keys.
    """

    before: KeyAnnotations | None
    prompt: Prompt | None
    noting: bool
    first: bool
    seen: Tensor
    attended: Tensor | None
    rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    visual: Tensor | None = None
    noted: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    joined: dict[int, LayerFacts] = field(default_factory=dict)


class AttentionInterventions:
    """Runs interventions on one model.

    Args:
        adapter: the model's family.
        interventions: objects of this model alone.
        calls: the calls at work.
        cuts: K of the stages at "layer:K" beside them.

    Raises:
        ValueError: two act in one layer, a layer's attention cannot be reached, or an option has nothing to act on.
    """

    def __init__(
        self, adapter: Adapter, interventions: Sequence[Intervention], calls: Calls, cuts: Sequence[int] = ()
    ) -> None:
        self.adapter, self.interventions, self._calls = adapter, tuple(interventions), calls
        config = adapter.language_model.config
        decoder = DecoderInfo(
            adapter.name,
            config.model_type,
            config.hidden_size,
            len(adapter.layers),
            config.num_attention_heads,
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        )
        self.layers: dict[int, int] = {}  # which intervention acts in which layer
        for number, one in enumerate(self.interventions):
            layers = one.prepare(decoder)
            if layers:
                one.check_cuts(layers, cuts)
            for layer in layers:
                if layer in self.layers:
                    other = self.interventions[self.layers[layer]].name
                    raise ValueError(
                        f"{other} and {one.name} both act in decoder layer {layer}; one layer takes one intervention. "
                        "Give each its own layers=[...]."
                    )
                self.layers[layer] = number
        kind = str(getattr(config, "_attn_implementation", None) or "eager")
        if self.layers and any(word in kind for word in ("flex", "paged")):
            raise ValueError(
                f"Interventions read the mask of a layer, and {kind!r} has none that can be read. Load the model with "
                "attn_implementation='sdpa', 'eager' or a flash attention."
            )
        self._places: dict[Any, int] = {
            unwrap(adapter.attention(adapter.layers[layer])): layer for layer in self.layers
        }
        self._stock: dict[int, tuple[Any, Any]] = {}  # the layer's own config, and its eager function
        self._run_again: set[int] = set()  # layers in which checkpoint wrappers run attention a second time
        self._interfaces: Any = None

    @property
    def _call(self) -> _Call | None:
        return None if self._calls.now is None else self._calls.now.attention

    @property
    def learns(self) -> bool:
        """Whether an intervention still learns from the prompts that it sees, so that they must come one by one."""
        return any(one.wants_prompts for one in self.interventions)

    def __bool__(self) -> bool:
        return bool(self.layers)

    def install(self, ledger: Ledger) -> None:
        """Name the private function in this model's attention modules; `ledger` takes it away."""
        if not self:
            return
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
                    f"{self.interventions[self.layers[layer]].name} cannot act in it."
                )
            self._stock[layer] = module.config, eager
            renamed = copy.copy(module.config)
            renamed._attn_implementation = name
            ledger.set(module, "config", renamed)
            hook = opaque(self._enter_layer)
            ledger.hook(self.adapter.layers[layer].register_forward_pre_hook(hook, with_kwargs=True))

    # --- a call of the decoder --------------------------------------------------------------------------------------

    def begin(self, inputs: CallInputs, prompt: Prompt | None) -> None:
        """A call of the decoder begins.

        Args:
            inputs: what the decoder was given, before any cut.
            prompt: of this call, laid out; None without pictures.
        """
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
        call = self._calls.now.attention = _Call(before, prompt, noting, inputs.past == 0, seen, attended)
        if prompt is None:
            return
        visual = torch.zeros(batch_size, prompt.layout.length, dtype=torch.bool)
        for span in prompt.layout.spans:
            visual[span.sample, span.places] = True
        real = torch.ones_like(visual) if prompt.attended is None else prompt.attended
        had = seen.cpu() if before is not None else torch.zeros(batch_size, dtype=torch.bool)
        for number, one in enumerate(self.interventions):
            wanted = one.rows(visual, real, had)
            most = max(int(wanted.sum(1).max()), 1)
            index = wanted.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
            call.rows[number] = index.to(device), wanted.gather(1, index).to(device)
        call.seen = seen | visual.any(1).to(device)

    def _check_checkpointing(self) -> None:
        for layer in self.layers:
            block = self.adapter.layers[layer]
            if block.training and (getattr(block, "gradient_checkpointing", False) or layer in self._run_again):
                raise ValueError(
                    f"{self.interventions[self.layers[layer]].name} acts in decoder layer {layer}, which gradient "
                    "checkpointing runs a second time, after the prompt is forgotten. Switch gradient checkpointing "
                    "off, or remove the intervention for training."
                )

    def cut(self, compaction: Compaction, layer: int | None = None) -> None:
        """Tokens left: at the input, or before `layer`."""
        call = self._call
        if call is None:
            return
        target, length = compaction.target, compaction.index.shape[1]
        call.rows = {
            number: (target.gather(1, rows).clamp(0, length - 1), real) for number, (rows, real) in call.rows.items()
        }
        call.attended = compaction.real if compaction.padded else None
        call.visual = None
        if layer in call.noted:
            noted = call.noted[layer]
            moved = dict(zip(noted, compaction.move(list(noted.values()))))
            call.noted[layer] = {
                name: values.masked_fill(~compaction.real.to(values.device), 0) for name, values in moved.items()
            }

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
        if not call.noting or not call.joined:
            return
        applies = torch.stack([facts.applies.to(call.seen.device) for facts in call.joined.values()]).cpu()
        layers = {
            layer: replace(facts, some=bool(row.any()), every=bool(row.all()))
            for row, (layer, facts) in zip(applies, call.joined.items())
        }
        if call.prompt is not None:
            call.prompt.noted = self.by_intervention({layer: facts.values for layer, facts in layers.items()})
        if cache is not None:
            mark_facts(cache, KeyAnnotations(layers, call.seen))

    def by_intervention(self, layers: Mapping[int, Facts]) -> list[dict[int, Facts]]:
        """Facts by layer, for each intervention."""
        facts: list[dict[int, Facts]] = [{} for _ in self.interventions]
        for layer, values in layers.items():
            facts[self.layers[layer]][layer] = values
        return facts

    def summaries(self, prompt: Prompt) -> tuple[str, ...]:
        """A line for each intervention: name, layers, what it found in `prompt`."""
        lines = []
        for number, one in enumerate(self.interventions):
            layers = [layer for layer, owner in self.layers.items() if owner == number]
            noted = prompt.noted[number] if prompt.noted else {}
            lines.append(f"{one.name}  layers {runs(layers) or 'none'}; {one.summary(noted)}".rstrip("; "))
        return tuple(lines)

    # --- a layer ----------------------------------------------------------------------------------------------------

    def _enter_layer(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._call
        if call is None or not call.noting:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        layer = self._places[unwrap(self.adapter.attention(module))]
        if call.visual is None:
            call.visual = self._visual(call.prompt, hidden)
        visual = call.visual.to(hidden.device)
        pictures = functools.partial(_picture_keys, call.prompt, hidden.shape[0])
        entering = Entering(layer, hidden.detach(), visual, call.attended, call.first, pictures)
        with torch.no_grad():
            noted = self.interventions[self.layers[layer]].note(entering)
        new = self._new(call, hidden)
        call.noted[layer] = noted if new is None else {name: v.masked_fill(~new, 0) for name, v in noted.items()}

    @staticmethod
    def _new(call: _Call, hidden: Tensor) -> Tensor | None:
        """`[B, S]` bool: tokens on which facts are kept; None: all. What a draft proposed is no part of the prompt, and
        a row that gets no picture in a later turn is as if it were alone."""
        prompt = call.prompt
        if prompt is None or (call.first and not prompt.drafted):
            return None
        rows = torch.ones(hidden.shape[0], 1, dtype=torch.bool)
        if not call.first:
            rows[:] = False
            rows[[span.sample for span in prompt.layout.spans]] = True
        new = rows.repeat(1, hidden.shape[1])
        new[:, hidden.shape[1] - prompt.drafted :] = False
        return new.to(hidden.device)

    @staticmethod
    def _visual(prompt: Prompt | None, hidden: Tensor) -> Tensor:
        visual = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if prompt is not None:
            for span, alive in zip(prompt.layout.spans, prompt.alive):
                standing = alive.places if alive.placeholders is None else alive.placeholders
                visual[span.sample, standing.to(hidden.device)] = True
        return visual

    def _facts(self, layer: int, call: _Call, held: int) -> LayerFacts | None:
        """Facts on the keys of a layer, of which `held` were there before the call."""
        before = None if call.before is None else call.before.layers.get(layer)
        noted = call.noted.get(layer)
        if not noted:
            return before
        if layer not in call.joined:
            values = {name: self._join(before, name, new, held) for name, new in noted.items()}
            call.joined[layer] = LayerFacts(values, self.interventions[self.layers[layer]].applies(values))
        return call.joined[layer]

    @staticmethod
    def _join(before: LayerFacts | None, name: str, new: Tensor, held: int) -> Tensor:
        if not held:
            return new
        old = new.new_zeros(new.shape[0], held)
        known = None if before is None else before.values.get(name)
        if known is not None:
            old[:, : known.shape[1]] = known.to(new.device)
        return torch.cat([old, new], dim=1)

    def _attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        layer = self._places[module]

        def stock() -> tuple[Tensor, Any]:
            config, eager = self._stock[layer]
            stock_function = self._interfaces.get_interface(config._attn_implementation, eager)
            return stock_function(module, query, key, value, attention_mask, **kwargs)

        call, number = self._call, self.layers[layer]
        if call is None:
            return stock()
        facts = self._facts(layer, call, key.shape[2] - query.shape[2])
        if facts is None or not facts.some:
            return stock()
        one = self.interventions[number]
        if call.prompt is None and call.noting and one.visual_only:
            return stock()
        rows, real = (part.to(query.device) for part in call.rows[number]) if number in call.rows else (None, None)
        given = Attended(
            layer=layer,
            query=query if rows is None else _take(query, rows, 2),
            key=key,
            value=value,
            allowed=_allowed(attention_mask, rows, query.shape[2], key, kwargs.get("sliding_window")),
            scale=kwargs.get("scaling") or query.shape[-1] ** -0.5,
            facts=facts.values,
            real=real,
            prompt=call.noting,
        )
        changed = one.attend(given)
        if changed is None:
            return stock()
        if call.prompt is not None:
            call.prompt.attention_flops[layer] = one.flops(given)
        changed = changed.transpose(1, 2)
        if rows is None and facts.every:
            return changed, None
        output, _ = stock()
        applies = facts.applies[:, None]
        if rows is None or real is None:
            return torch.where(applies[..., None, None], changed, output), None
        # places that stand for no row hold what was there
        kept = _take(output, rows, 1)
        changed = torch.where((real & applies)[..., None, None], changed, kept)
        return _put(output, rows, real, changed), None


def _weakly(attending: AttentionInterventions) -> Callable[..., tuple[Tensor, Any]]:
    """Its attention function, which a table of transformers can hold without holding the model."""
    reference = weakref.ref(attending)

    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        owner = reference()
        if owner is None:
            raise RuntimeError("An attention module of a model that is gone was called; load the model anew.")
        return owner._attention(*args, **kwargs)

    return attention


def _picture_keys(prompt: Prompt | None, batch_size: int) -> Tensor:
    keys = torch.zeros(batch_size, dtype=torch.int64)
    for span, (recording, row) in zip(prompt.layout.spans, prompt.sources) if prompt is not None else ():
        keys[span.sample] = keys[span.sample] * 31 + recording.pixel_key(row).cpu()
    return keys


def runs(numbers: Sequence[int]) -> str:
    """`[2, 3, 4, 7]` as "2-4, 7"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _take(values: Tensor, rows: Tensor, dim: int) -> Tensor:
    """Of `[B, ...]`, the places `[B, R]` along `dim`."""
    shape = [1] * values.dim()
    shape[0], shape[dim] = rows.shape
    wide = list(values.shape)
    wide[dim] = rows.shape[1]
    return values.gather(dim, rows.view(shape).expand(wide))


def _put(output: Tensor, rows: Tensor, real: Tensor, changed: Tensor) -> Tensor:
    """`output` `[B, S, H, d]` with `changed` `[B, R, H, d]` at `rows` where `real`."""
    # a spare last row takes what stands for no row, so that no place is written twice
    length = output.shape[1]
    spare = torch.cat([output, output[:, :1]], dim=1)
    index = torch.where(real, rows, length)[..., None, None].expand_as(changed)
    return spare.scatter(1, index, changed.to(output.dtype))[:, :length]


def _allowed(mask: Any, rows: Tensor | None, queries: int, key: Tensor, window: int | None) -> Tensor | None:
    """`[B or 1, R, K]` bool: which keys the rows `[B, R]` (None: all `queries`) see; None where that is all."""
    count, device = key.shape[2], key.device
    if isinstance(mask, Tensor) and mask.dim() == 4:
        seen = mask[:, 0, :, :count]
        seen = seen if seen.dtype == torch.bool else seen >= 0
        if rows is None:
            return seen
        seen = seen.expand(rows.shape[0], -1, -1)
        return _take(seen, rows, 1)
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise ValueError(
            f"A layer was given a {type(mask).__name__} for a mask; interventions work with SDPA, eager and flash "
            "attention only. Load the model with attn_implementation='sdpa'."
        )
    if mask is None and queries == 1 and window is None:
        return None
    query_rows = torch.arange(queries, device=device)[None] if rows is None else rows
    at = torch.arange(count, device=device)
    last = query_rows[..., None] + (count - queries)
    seen = at <= last
    if window is not None:  # flash attention is told so beside the mask
        seen = seen & (at > last - window)
    return seen if mask is None else seen & mask[:, None, :count].to(torch.bool)
