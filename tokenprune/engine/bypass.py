"""Decoder layers that run text alone, over the keys and values of all tokens; see `tokenprune.interfaces.bypass`.

A hook in front of such a layer hands it the text rows `[B, T, D]` with the masks, positions and rotary tables of those,
and a cache that puts the keys and values of visual tokens between those of text, so that what is cached is as ever. A
hook behind it puts text back among the visual tokens. Where nobody else looks at what a layer returns, that is done in
place: visual rows are written once for a run of layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.cost import LayerShape
from tokenprune.engine.key_facts import visual_rows
from tokenprune.engine.layer_cuts import named
from tokenprune.engine.query_rows import along, take
from tokenprune.hooks import Ledger, opaque
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.attention_reading import AttentionReading
from tokenprune.interfaces.bypass import Bypass, Mode
from tokenprune.interfaces.pruner import Stage
from tokenprune.interfaces.signals import TRANSITION_SIGNALS
from tokenprune.seams import cache_name, cache_of
from tokenprune.state.forward_call import Calls
from tokenprune.state.prompt_state import Prompt
from tokenprune.wrappers import runs_again

_BY_ROW = ("attention_mask", "position_ids", "position_embeddings")


@dataclass
class Rows:
    """Where text and visual tokens stand in the rows `[B, P, D]` of a call.

    Attributes:
        visual_mask: `[B, P]` bool.
        text: `[B, T]`, in order; a row with less text than others repeats its last, one without any has a visual token.
        visual: `[B, V]`; a row with fewer visual tokens than others has text in front, which is put back after them.
        counts: by sample, its text and its visual tokens, padding not counted.
        textless: `[B]` bool, rows that are visual tokens alone; None where there is none.
    """

    visual_mask: Tensor
    text: Tensor
    visual: Tensor
    counts: list[tuple[int, int]]
    textless: Tensor | None

    def text_or(self, there: Tensor, text: Tensor, dim: int) -> Tensor:
        """`text` `[B, .., T, D]`, its rows along `dim`; of rows without text, what stands there in `there`."""
        if self.textless is None:
            return text
        place = self.text.view(len(self.text), *[1] * (dim - 1), -1, 1).expand_as(text)
        alone = self.textless.view(-1, *[1] * (text.dim() - 1))
        return torch.where(alone, there.gather(dim, place), text.to(there.dtype))


@dataclass
class BypassCall:
    """What a call of the decoder knows of its bypassed layers.

    Attributes:
        rows: as they stand, and the number of cuts and tokens of which that is.
        buffer: what the last bypassed layer returned, into which the next one may write text.
        still: the visual rows of it, `[B, V, D]`.
        entered: what entered the layer at work, `[B, P, D]`, and the visual rows of it, `[B, V, D]`.
    """

    rows: tuple[tuple[int, int], Rows] | None = None
    buffer: Tensor | None = None
    still: Tensor | None = None
    entered: tuple[Tensor, Tensor] | None = None


class LayerBypass:
    """Runs bypasses on one model.

    Args:
        adapter: the model's family.
        bypasses: with the layers in which each acts.
        calls: the calls at work.
        stages: beside them.
        changed: layers whose attention an intervention changes, or whose keys are biased, and what does it.

    Raises:
        ValueError: a layer that something else changes, or that is not given what a bypass changes.
    """

    def __init__(
        self,
        adapter: Adapter,
        bypasses: Sequence[tuple[Bypass, Sequence[int]]],
        calls: Calls,
        stages: Sequence[Stage],
        changed: Mapping[int, str],
    ) -> None:
        self.adapter, self._calls = adapter, calls
        self.layers: dict[int, Bypass] = {}
        self._read: dict[int, AttentionReading] = {}
        self._skipped: dict[int, Skipped | None] = {}
        self._run_again: set[int] = set()  # layers that checkpoint wrappers run a second time
        for one, layers in bypasses:
            for layer in layers:
                other = changed.get(layer) or (self.layers[layer].name if layer in self.layers else None)
                if other is not None:
                    raise ValueError(
                        f"{other} and {one.name} both act in decoder layer {layer}; one layer takes one intervention. "
                        "Give each its own layers=[...]."
                    )
                self.layers[layer] = one
        if self.layers:
            self._check(stages)

    def __bool__(self) -> bool:
        return bool(self.layers)

    def _check(self, stages: Sequence[Stage]) -> None:
        adapter = self.adapter
        config = adapter.language_model.config
        who = next(iter(self.layers.values())).name
        kind = str(getattr(config, "_attn_implementation", None) or "eager")
        if kind not in ("sdpa", "eager"):
            raise ValueError(
                f"{who} gives the queries of text a mask of their own, which {kind!r} takes none of. Load the model "
                "with attn_implementation='sdpa' or 'eager'."
            )
        for stage in stages:
            for signal in stage.signals(adapter.tower):
                if signal.name in TRANSITION_SIGNALS and signal.layer in self.layers:
                    raise ValueError(
                        f"{stage.pruner.name} reads what decoder layer {signal.layer} adds to visual tokens, and "
                        f"{who} lets them pass it by. Give {who} other layers=[...]."
                    )
        for layer, one in self.layers.items():
            module = adapter.layers[layer]
            if adapter.key_layer(layer) != layer:
                raise ValueError(f"{one.name} shall act in layer {layer}, which has no keys of its own. Leave it out.")
            if not _takes_cache(module, adapter.attention(module)):
                raise ValueError(
                    f"{type(adapter.attention(module)).__name__} takes no {cache_name()}, through which {one.name} "
                    "gives it the keys of visual tokens, so it cannot act in this model."
                )
            if one.mode == "mlp":
                _norm_of_mlp(module)
                adapter.branches(module)

    def install(self, ledger: Ledger) -> None:
        """Place the hooks; `ledger` takes them away. Those of cuts at the same layers must stand already."""
        self._run_again = {one for one in self.layers if runs_again(self.adapter.model, self.adapter.layers[one])}
        shapes = self.adapter.cost_shape().layer_shapes()
        for layer, one in self.layers.items():
            module = self.adapter.layers[layer]
            self._read[layer] = self.adapter.reading(module)
            self._skipped[layer] = skipped(self.adapter, layer, shapes[layer], one.mode)
            enter, leave = opaque(partial(self._enter, layer)), opaque(partial(self._leave, layer))
            ledger.hook(module.register_forward_pre_hook(enter, with_kwargs=True))
            # first, while what shards or offloads weights still has those of this layer here
            ledger.hook(module.register_forward_hook(leave, prepend=True))

    # --- a layer ----------------------------------------------------------------------------------------------------

    def _enter(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._calls.now
        if call is None or call.prompt is None or not call.prompt.layout.spans:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]  # [B, P, D]
        self._check_checkpointing(layer, module)
        if call.bypass is None:
            call.bypass = BypassCall()
        state: BypassCall = call.bypass
        rows = self._rows(state, call.prompt, hidden)
        if not rows.visual.shape[1]:
            return None
        if args:
            args, kwargs = args[:1], {**named(module, args[1:]), **kwargs}
        past = _held(cache_of(kwargs), layer)
        mask = kwargs.get("attention_mask")
        if not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)):
            raise ValueError(
                f"Decoder layer {layer} was given a {type(mask).__name__} for a mask, of which "
                f"{self.layers[layer].name} cannot take the rows of text. Load the model with "
                "attn_implementation='sdpa'."
            )
        if self.layers[layer].mode == "mask":
            return self._masked(rows, hidden, past, args, kwargs)
        if state.buffer is not hidden or state.still is None:
            state.still = take(hidden, rows.visual, 1)  # [B, V, D]
        state.entered = hidden, state.still
        self._count(layer, call.prompt, rows)
        changed = {name: _of_rows(name, value, rows.text) for name, value in kwargs.items() if name in _BY_ROW}
        changed |= self._by_place(layer, kwargs, hidden, rows.text)
        if mask is None:
            at = torch.arange(past + hidden.shape[1], device=hidden.device)
            changed["attention_mask"] = (at <= past + rows.text[..., None])[:, None]  # [B, 1, T, K]
        turned = kwargs.get("position_embeddings")
        rotation = None if turned is None else _of_rows("position_embeddings", turned, rows.visual)
        changed[cache_name()] = _Cache(cache_of(kwargs), self._read[layer], state.still, rotation, rows)
        text = take(hidden, rows.text, 1)  # [B, T, D]
        if args:
            return (text,), {**kwargs, **changed}
        return args, {**kwargs, **changed, "hidden_states": text}

    def _leave(self, layer: int, module: Any, args: Any, output: Any) -> Any:
        call = self._calls.now
        state: BypassCall | None = None if call is None else call.bypass
        if call is None or state is None or state.entered is None or state.rows is None:
            return None
        hidden, still = state.entered
        state.entered = None
        rows = state.rows[1]
        text = output[0] if isinstance(output, tuple) else output  # [B, T, D]
        alone = self._unwatched(call.arguments, module)
        whole = hidden if state.buffer is hidden and alone else hidden.clone()
        if self.layers[layer].mode == "mlp":
            still = still + _states(self.adapter.branches(module)[1](_norm_of_mlp(module)(still)))
            _put(whole, rows.visual, still)
        _put(whole, rows.text, rows.text_or(whole, text, 1))
        state.buffer, state.still = (whole, still) if alone else (None, None)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    def _unwatched(self, arguments: Mapping[str, Any], module: nn.Module) -> bool:
        """Whether what a layer returns goes to the next one alone, so that the next may write into it."""
        wanted = arguments.get("output_hidden_states")
        config = self.adapter.language_model.config
        kept = getattr(config, "output_hidden_states", False) if wanted is None else wanted
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        return hooks == 2 and not kept and not torch.is_grad_enabled()

    def _masked(self, rows: Rows, hidden: Tensor, past: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments of a layer that runs all rows, of which visual ones see no other visual one."""
        mask, visual = kwargs.get("attention_mask"), rows.visual_mask
        length, device = hidden.shape[1], hidden.device
        apart = visual[:, :, None] & visual[:, None] & ~torch.eye(length, dtype=torch.bool, device=device)  # [B, P, P]
        apart = torch.nn.functional.pad(apart, (past, 0))[:, None]  # [B, 1, P, K]
        if mask is None:
            mask = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
            mask = mask & ~apart
        elif mask.dtype == torch.bool:
            mask = mask[..., : past + length] & ~apart
        else:
            mask = mask[..., : past + length].masked_fill(apart, torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    def _rows(self, state: BypassCall, prompt: Prompt, hidden: Tensor) -> Rows:
        key = (len(prompt.cuts), hidden.shape[1])
        if state.rows is None or state.rows[0] != key:
            state.rows, state.buffer, state.still = (key, _rows(prompt, hidden)), None, None
        return state.rows[1]

    def _by_place(self, layer: int, kwargs: Mapping[str, Any], hidden: Tensor, text: Tensor) -> dict[str, Any]:
        """What else the layer is handed for each token, for those of text."""
        found = {}
        for name, value in kwargs.items():
            if (
                name in (*_BY_ROW, "hidden_states")
                or not isinstance(value, Tensor)
                or value.shape[:2] != hidden.shape[:2]
            ):
                continue
            if name not in self.adapter.layer_by_place:
                raise ValueError(
                    f"The layers of {type(self.adapter.language_model).__name__} are given {name!r} for each token, "
                    f"and what that means for text alone is not known, so {self.layers[layer].name} cannot act there."
                )
            found[name] = take(value, text.to(value.device), 1)
        return found

    def _check_checkpointing(self, layer: int, module: Any) -> None:
        again = getattr(module, "gradient_checkpointing", False) or layer in self._run_again
        if again and module.training and torch.is_grad_enabled():
            raise ValueError(
                f"{self.layers[layer].name} acts in decoder layer {layer}, which gradient checkpointing runs a second "
                "time, after the prompt is forgotten. Switch gradient checkpointing off, or remove the intervention "
                "for training."
            )

    def _count(self, layer: int, prompt: Prompt, rows: Rows) -> None:
        """Write down what a layer saves, as a negative number."""
        skips = self._skipped[layer]
        prompt.attention_flops[layer] = None if skips is None else -sum(skips.flops(*count) for count in rows.counts)


class _Cache:
    """The cache of a layer that is handed text alone: keys and values of visual tokens go between those of text."""

    def __init__(
        self, real: Any, reading: AttentionReading, still: Tensor, rotation: tuple[Tensor, Tensor] | None, rows: Rows
    ) -> None:
        self._real, self._reading, self._still, self._rotation, self._rows = real, reading, still, rotation, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add the new keys and values, `[B, Hk, T, d]` of text; returns those of all tokens, `[B, Hk, K, d]`."""
        keys, values = self._reading.keys_and_values(self._still)  # [B, Hk, V, d]
        if self._rotation is not None:
            keys = self._reading.rotate(keys, self._rotation)
        key, value = self._joined(keys, key), self._joined(values, value)
        return (key, value) if self._real is None else self._real.update(key, value, *args, **kwargs)

    def _joined(self, visual: Tensor, text: Tensor) -> Tensor:
        rows = self._rows
        whole = text.new_empty(*text.shape[:2], rows.visual_mask.shape[1], text.shape[-1])
        whole = whole.scatter(2, rows.visual[:, None, :, None].expand_as(visual), visual.to(whole.dtype))
        text = rows.text_or(whole, text, 2)  # where a row has both, text counts
        return whole.scatter(2, rows.text[:, None, :, None].expand_as(text), text)


@dataclass(frozen=True)
class Skipped:
    """What a visual token leaves undone in a layer that it passes by, in multiply-adds.

    Attributes:
        linear: of linear layers.
        scores: with each token of its row, in scores and in the sum of values.
    """

    linear: int
    scores: int

    def flops(self, text: int, visual: int) -> int:
        """Of a row of so many tokens."""
        return 2 * visual * (self.linear + (text + visual) * self.scores)


def skipped(adapter: Adapter, layer: int, shape: LayerShape | None, mode: Mode) -> Skipped | None:
    """What a visual token saves in a layer of that shape; None if it is not modelled."""
    if mode == "mask":
        return Skipped(0, 0)
    if shape is None:
        return None
    projections = adapter.reading(adapter.layers[layer]).projections
    made = {id(part): part for part in (projections["k"], projections["v"])}.values()
    linear = shape.linear - sum(_multiply_adds(part) for part in made)
    if mode == "mlp":
        linear -= _multiply_adds(adapter.branches(adapter.layers[layer])[1])
    return Skipped(linear, shape.scores)


def _multiply_adds(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.dim() == 2)


def _rows(prompt: Prompt, hidden: Tensor) -> Rows:
    batch, length = hidden.shape[:2]
    mask = visual_rows(prompt, hidden)  # [B, P]
    visual = [0] * batch
    for span, alive in zip(prompt.layout.spans, prompt.alive):
        visual[span.sample] += len(alive.places if alive.placeholders is None else alive.placeholders)
    order = mask.to(torch.int8).argsort(dim=1, stable=True)  # text first
    count = torch.tensor([max(length - number, 1) for number in visual], device=hidden.device)[:, None]  # [B, 1]
    most = max(length - min(visual), 1)
    text = order.gather(1, torch.arange(most, device=hidden.device).minimum(count - 1))
    lengths = prompt.cuts[-1].lengths if prompt.cuts else (prompt.lengths or [length] * batch)
    counts = [(all_of - number, number) for all_of, number in zip(lengths, visual)]
    textless = torch.tensor([number == length for number in visual], device=hidden.device) if length in visual else None
    return Rows(mask, text, order[:, length - max(visual) :], counts, textless)


def _of_rows(name: str, value: Any, rows: Tensor) -> Any:
    """Of a layer's argument, what belongs to the rows `[B, R]`."""
    if value is None:
        return None
    if name == "position_embeddings":
        parts = [along(part, rows, -2) for part in ([value] if isinstance(value, Tensor) else value)]
        return parts[0] if isinstance(value, Tensor) else tuple(parts)
    if name == "position_ids":
        return along(value, rows, -1)
    mask = value.expand(rows.shape[0], *value.shape[1:])  # [B, 1 or H, P, K]
    return take(mask, rows.to(value.device), 2)


def _put(whole: Tensor, rows: Tensor, part: Tensor) -> None:
    """Write `[B, R, D]` at the places `[B, R]` of `[B, P, D]`."""
    whole.scatter_(1, rows[..., None].expand_as(part), part.to(whole.dtype))


def _held(cache: Any, layer: int) -> int:
    """Keys that a layer's cache holds."""
    if cache is None or layer >= len(cache.layers):
        return 0
    keys = getattr(cache.layers[layer], "keys", None)
    return keys.shape[2] if isinstance(keys, Tensor) and keys.dim() == 4 else 0


def _states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _norm_of_mlp(layer: Any) -> nn.Module:
    norm = getattr(layer, "post_attention_layernorm", None)
    if not isinstance(norm, nn.Module) or hasattr(layer, "pre_feedforward_layernorm"):
        raise ValueError(
            f"{type(layer).__name__} does not have one norm before its MLP (post_attention_layernorm), so visual "
            "tokens cannot pass its MLP alone. Use variant='skip'."
        )
    return norm


def _takes_cache(layer: nn.Module, attention: nn.Module) -> bool:
    return all(
        cache_name() in (parameters := inspect.signature(module.forward).parameters)
        or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        for module in (layer, attention)
    )
