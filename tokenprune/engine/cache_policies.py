"""A cache policy at work: it is asked behind the attention of each layer, and keys move when the call is over.

Keys that leave are gathered out of the layer's cache, and the cache's map of keys to tokens (`PrunedPrompt`) says how
many are left, so that masks, positions and lengths are those of any pruned prompt. The order of keys is of no meaning:
they are rotated already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.engine.query_rows import seen_keys
from tokenprune.hooks import Ledger, opaque
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.cache_policy import CachePolicy, Kept, LayerKeys, open_weights
from tokenprune.seams import cache_of
from tokenprune.state.call_inputs import CallInputs
from tokenprune.state.forward_call import Calls
from tokenprune.state.kv_cache import PrunedPrompt, Segment, mark_pruned, pruned_prompt
from tokenprune.state.policy_state import Aside, PolicyLayer, PolicyState
from tokenprune.state.prompt_state import Prompt


@dataclass
class PolicyCall:
    """One call under a policy.

    Attributes:
        state: of the cache, as it was before.
        prompt: the call's, where it brought pictures.
        step: see `LayerKeys`.
        inputs: what the decoder was given.
        kept: by layer, what the policy said.
        made: by layer, keys and values that it made.
    """

    state: PolicyState
    prompt: Prompt | None
    step: int
    inputs: CallInputs
    kept: dict[int, Kept] = field(default_factory=dict)
    made: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class CachePolicies:
    """Runs the cache policy of one model.

    Args:
        adapter: the family.
        policies: those that were asked for, with their layers.
        calls: the calls at work.
        changed: layers whose attention something else changes, with its name.

    Raises:
        ValueError: two policies, or one together with what notes facts on keys.
    """

    def __init__(
        self,
        adapter: Adapter,
        policies: Sequence[tuple[CachePolicy, tuple[int, ...]]],
        calls: Calls,
        changed: dict[int, str],
    ) -> None:
        acting = [(policy, layers) for policy, layers in policies if layers]
        if len(acting) > 1:
            raise ValueError(
                f"{acting[0][0].name} and {acting[1][0].name} both say what stays in the KV cache; give one of them."
            )
        self._adapter, self._calls, self._changed = adapter, calls, changed
        self.policy: CachePolicy | None = acting[0][0] if acting else None
        self.layers = acting[0][1] if acting else ()
        if self.policy is None:
            return
        if len(self.layers) < len(adapter.layers):
            raise ValueError(
                f"{self.policy.name} acts in all decoder layers, because a cache has one length for a batch's padding; "
                "leave layers out."
            )
        if changed:
            raise ValueError(
                f"{next(iter(changed.values()))} notes facts on the keys of decoder layer {next(iter(changed))}, and "
                f"{self.policy.name} moves keys. Give one of the two."
            )
        kinds = set(getattr(adapter.language_model.config, "layer_types", None) or ()) - {"full_attention"}
        if kinds:
            raise ValueError(
                f"{self.policy.name} takes keys out of the cache, and this decoder has layers of the kind "
                f"{sorted(kinds)[0]}, which count places or hold a state. Use a decoder whose layers see all."
            )

    def __bool__(self) -> bool:
        return self.policy is not None

    def install(self, ledger: Ledger) -> None:
        """Stand behind the attention modules, for a policy that makes keys of its own."""
        for layer in self.layers if self.policy is not None and self.policy.compresses else ():
            module: Any = self._adapter.attention(self._adapter.layers[layer])

            def hook(module: Any, args: Any, kwargs: Any, output: Any, layer: int = layer) -> None:
                self._compress(layer, module, args, kwargs, output)

            ledger.hook(module.register_forward_hook(opaque(hook), with_kwargs=True))

    @property
    def _call(self) -> PolicyCall | None:
        return None if self._calls.now is None else self._calls.now.policy

    # --- a call -----------------------------------------------------------------------------------------------------

    def begin(self, inputs: CallInputs, prompt: Prompt | None) -> None:
        """A call of the decoder begins; what waits comes back where all is read."""
        policy, now = self.policy, self._calls.now
        state: PolicyState | None = getattr(inputs.cache, "tokenprune_policy", None)
        if now is None or inputs.past < 0:  # counted now, before the call adds to the cache
            return
        now.policy, now.given = None, inputs
        if policy is None:
            return
        spans = () if prompt is None else prompt.layout.spans
        if state is None and (inputs.past if policy.compresses else not spans):
            return
        if state is not None and spans and policy.compresses:
            return
        if state is not None and spans:
            raise ValueError(
                f"This call brings a picture to a cache that {policy.name} has thinned already; which of its keys stay "
                "was said by the pictures before. Run the whole conversation as one prompt."
            )
        if state is None:
            state = _new_state(policy.name, prompt, inputs)
        step = 0 if inputs.length > 1 else state.step + 1
        if policy.reads_all(step) and any(keys.aside is not None for keys in state.layers.values()):
            self._put_back(inputs, state)
        now.policy = PolicyCall(state, prompt if spans else None, step, inputs)

    def _put_back(self, inputs: CallInputs, state: PolicyState) -> None:
        past = inputs.past  # of the caller's tokens; the cache counts them by what its layers hold
        for layer, keys in state.layers.items():
            aside, keys.aside = keys.aside, None
            if aside is None:
                continue
            held = inputs.cache.layers[layer]
            _decoded(keys, held.keys.shape[2], state)
            held.keys, held.values = (
                torch.cat(pair, dim=2) for pair in ((aside.key, held.keys), (aside.value, held.values))
            )
            first = aside.image.shape[1]
            keys.image = torch.cat([aside.image, keys.image], dim=1)
            keys.text = torch.nn.functional.pad(keys.text, (first, 0))
            keys.real = torch.cat([aside.real, keys.real], dim=1)
            keys.noted = {name: torch.nn.functional.pad(values, (first, 0)) for name, values in keys.noted.items()}
        _mark(inputs.cache, state, past, _real(inputs, past))

    def attended(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        scale: float,
        stock: Callable[[], tuple[Tensor, Any]],
    ) -> tuple[Tensor, Any]:
        """Attention of a layer, `[B, S, H, d]` and what goes with it; the policy is asked behind it.

        Args:
            query, key, value: see `Attended`.
            mask: as the layer was given it.
            scale: what products are multiplied by.
            stock: the layer's own.
        """
        call, policy = self._call, self.policy
        if call is None or policy is None or policy.compresses or not policy.asked(call.step):
            return stock()
        keys = self._enter(call, layer, query, key)
        alone = query.shape[2] == 1
        allowed = seen_keys(mask, None, query.shape[2], key, None)
        weights = open_weights(query, key, scale, None if allowed is None else allowed[:, None]) if alone else None
        found = stock() if weights is None else (_mixed(weights, value).transpose(1, 2), None)
        rows = keys.real[:, keys.real.shape[1] - query.shape[2] :]
        last = (rows * torch.arange(1, rows.shape[1] + 1, device=rows.device)).argmax(1)
        given = LayerKeys(
            layer, query, key, scale, allowed, keys.image, keys.text, keys.real, last, call.state.pictures, call.step,
            keys.noted, keys.known, weights,
        )  # fmt: skip
        with torch.no_grad():
            kept = policy.keep(given)
        if kept is not None:
            call.kept[layer] = kept
        if call.prompt is not None and not alone:
            flops = call.prompt.attention_flops
            flops[layer] = (flops.get(layer) or 0) + policy.watch_flops(given)
        return found

    def _enter(self, call: PolicyCall, layer: int, query: Tensor, key: Tensor) -> PolicyLayer:
        """What is known of the keys of a layer, those of this call among them."""
        batch, new, held = query.shape[0], query.shape[2], key.shape[2] - query.shape[2]
        device, state, call_now = key.device, call.state, self._calls.now
        current = None if call_now is None else call_now.decoder
        real = call.inputs.attended(device) if current is None else current.attended
        real = torch.ones(batch, new, dtype=torch.bool, device=device) if real is None else real.to(device)
        image = torch.zeros(batch, new, dtype=torch.int64, device=device)
        if call.prompt is not None:
            number = [0] * batch
            for span, alive in zip(call.prompt.layout.spans, call.prompt.alive):
                number[span.sample] += 1
                standing = alive.places if alive.placeholders is None else alive.placeholders
                image[span.sample, standing.to(device)] = number[span.sample]
            text = real & (image == 0) & ((image > 0).cumsum(1) > 0)
        else:
            text = real & state.has.to(device)[:, None]
        if layer not in state.layers:
            before = torch.zeros(batch, held, dtype=torch.int64, device=device)
            seen = _real(call.inputs, held).to(device)
            shift = torch.zeros(batch, dtype=torch.int64, device=device), False
            state.layers[layer] = PolicyLayer(before, torch.zeros_like(seen), seen, shift)
        keys = state.layers[layer]
        _decoded(keys, held, state)
        keys.grown(image, text, real)
        return keys

    def _compress(self, layer: int, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call, policy, cache = self._call, self.policy, cache_of(kwargs)
        if call is None or policy is None or cache is None or call.step or call.state.layers:
            return
        held, hidden = cache.layers[layer], args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] != held.keys.shape[2]:
            return
        given = {
            **kwargs,
            "past_key_values": cache,
            "cache_position": torch.arange(hidden.shape[1], device=hidden.device),
        }
        with torch.no_grad():
            made = policy.compress(module, hidden, held.keys, held.values, output[1], given)
        if made is not None:
            call.made[layer] = made

    def finish(self, cache: Any, prompt: Prompt | None, cuts: bool) -> None:
        """The call is over: keys leave, or wait.

        Args:
            cache: that it left.
            prompt: of the call.
            cuts: whether stages cut inside the decoder.
        """
        call, now = self._call, self._calls.now
        if now is None:
            return
        given, now.policy, now.given = now.given, None, None
        if not self and prompt is not None and given is not None and cache is not None:
            self._look(cache, given, prompt, cuts)
        if call is None or cache is None:
            return
        if call.made:
            for layer, (key, value) in call.made.items():
                cache.layers[layer].keys, cache.layers[layer].values = key, value
            self._pressed(cache, call.inputs, call.state, self._name, prompt)
            cache.tokenprune_policy = call.state
        if not call.state.layers or call.made:
            return
        state = replace(call.state, step=call.step)
        before = pruned_prompt(cache)
        for layer, keys in state.layers.items():
            if before is not None:
                segment = before.segment(layer)
                keys.shift = segment.shift, segment.moved
            if layer in call.kept:
                _take_out(cache, layer, keys, call.kept[layer])
        length = call.inputs.past + call.inputs.length
        cache.tokenprune_policy = state
        if call.kept:
            _mark(cache, state, length, _real(call.inputs, length))
        if call.prompt is not None:
            call.prompt.held = _held(state)

    @property
    def _name(self) -> str:
        return "something else" if self.policy is None else self.policy.name

    def _look(self, cache: Any, inputs: CallInputs, prompt: Prompt, cuts: bool) -> None:
        """Whether something else took keys out of the cache in this call, a press of kvpress for one."""
        if not any(part._forward_hooks for layer in self._adapter.layers for part in layer.children()):
            return  # a press stands behind attention modules
        before, length = pruned_prompt(cache), inputs.past + inputs.length
        held = [
            layer.keys.shape[2] if type(layer).__name__ == "DynamicLayer" and isinstance(layer.keys, Tensor) else None
            for layer in cache.layers[: len(self._adapter.layers)]
        ]
        wanted = [length - (0 if before is None else before.hidden(layer)) for layer in range(len(held))]
        if not any(count is not None and count < whole for count, whole in zip(held, wanted)):
            return
        if self._changed or cuts:
            what = (
                next(iter(self._changed.values())) + " notes facts on keys"
                if self._changed
                else ("this method reads the cache of a layer before it cuts behind it")
            )
            raise ValueError(
                f"Something else (a press?) took keys out of the cache, and {what}. Use one of the two, or a method "
                "that cuts at 'input'."
            )
        self._pressed(cache, inputs, _new_state("press", prompt, inputs), "something else (a press?)", prompt)

    def _pressed(self, cache: Any, inputs: CallInputs, state: PolicyState, name: str, prompt: Prompt | None) -> None:
        """Write down how many keys are left in each layer, which ones is not known."""
        before, length = pruned_prompt(cache), inputs.past + inputs.length
        real = _real(inputs, length)
        if not bool(real.all()) or (before is not None and any(segment.padded for segment in before.segments)):
            raise ValueError(
                f"{name} thins the cache, presses know nothing of padding, and the rows of this batch differ in "
                "length. Give prompts one at a time."
            )
        for number, layer in enumerate(cache.layers[: len(self._adapter.layers)]):
            there = torch.ones(layer.keys.shape[0], layer.keys.shape[2], dtype=torch.bool, device=layer.keys.device)
            shift = torch.zeros(len(there), dtype=torch.int64, device=there.device), False
            if before is not None:
                shift = before.segment(number).shift, before.segment(number).moved
            state.layers[number] = PolicyLayer(there.long() * 0, ~there, there, shift)
        _mark(cache, state, length, real)
        if prompt is not None:
            prompt.held = _held(state)


def _decoded(keys: PolicyLayer, held: int, state: PolicyState) -> None:
    """Write down the keys up to `held` that steps brought in which the policy was not asked: decoded tokens all."""
    new = held - keys.image.shape[1]
    if new <= 0:
        return
    image = torch.zeros(keys.image.shape[0], new, dtype=torch.int64, device=keys.image.device)
    text = state.has.to(image.device)[:, None].expand(-1, new)
    keys.grown(image, text, torch.ones_like(text))


def _new_state(name: str, prompt: Prompt | None, inputs: CallInputs) -> PolicyState:
    counts = [0] * inputs.batch_size
    for span in () if prompt is None else prompt.layout.spans:
        counts[span.sample] += 1
    has = torch.tensor([count > 0 for count in counts])
    return PolicyState(name, {}, has, max(counts))


def _real(inputs: CallInputs, length: int) -> Tensor:
    """`[B, length]` bool: tokens that the caller counts and that are no padding."""
    if isinstance(inputs.mask, Tensor) and inputs.mask.dim() == 2:
        return inputs.mask[:, :length].to(torch.bool)
    device = None if inputs.embeds is None else inputs.embeds.device
    return torch.ones(inputs.batch_size, length, dtype=torch.bool, device=device)


def _mixed(weights: Tensor, value: Tensor) -> Tensor:
    """`[B, H, r, d]`: values `[B, Hk, K, d]` in the shares `[B, H, r, K]`."""
    batch, heads, rows, count = weights.shape
    key_heads, width = value.shape[1], value.shape[3]
    grouped = weights.reshape(batch * key_heads, heads // key_heads * rows, count).to(value.dtype)
    return torch.bmm(grouped, value.reshape(batch * key_heads, count, width)).view(batch, heads, rows, width)


def _take_out(cache: Any, layer: int, keys: PolicyLayer, kept: Kept) -> None:
    held = cache.layers[layer]
    if type(held).__name__ != "DynamicLayer" or held.keys.shape[2] != keys.image.shape[1]:
        raise ValueError(
            f"A cache policy takes keys out of a cache that grows by them, and layer {layer} of this one is a "
            f"{type(held).__name__}. Generate with the default cache (no cache_implementation)."
        )
    if kept.read.shape[1] not in (1, held.keys.shape[1]):
        raise ValueError(
            f"A cache policy takes out keys head by head, and layer {layer} keeps latents in its cache, of "
            f"{held.keys.shape[1]} head(s) where its attention has keys of {kept.read.shape[1]}. Use another decoder."
        )
    if kept.aside is not None:
        index, real = _places(kept.aside[:, None], keys.text)
        image = keys.image.gather(1, index[:, 0]) * real
        keys.aside = Aside(_gather(held.keys, index), _gather(held.values, index), image, real)
    index, real = _places(kept.read, keys.text)
    held.keys, held.values = _gather(held.keys, index), _gather(held.values, index)
    first = index[:, 0]
    keys.image, keys.text = keys.image.gather(1, first) * real, keys.text.gather(1, first) & real
    keys.noted = {name: values.gather(2, index.expand(-1, values.shape[1], -1)) for name, values in keys.noted.items()}
    keys.real = real


def _places(kept: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Of `[B, h, K]` bool, `[B, h, R]` int64, the places of what is kept, at the right end, and `[B, R]` bool, where
    there is something. `text` `[B, K]`, of which heads may keep other tokens, stands last: so a column is of the same
    kind in all heads."""
    count = kept[:, 0].sum(1)
    most = int(count.max())
    rank = kept.to(torch.int8) + (kept & text[:, None])
    index = rank.argsort(dim=2, stable=True)[:, :, kept.shape[2] - most :]
    return index, kept[:, 0].gather(1, index[:, 0])


def _gather(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(2, index[..., None].expand(-1, values.shape[1], -1, values.shape[3]))


def _mark(cache: Any, state: PolicyState, length: int, real: Tensor) -> None:
    """Tell the cache how many keys its layers hold of `length` tokens, of which `real` `[B, length]` are no padding.

    Which token a key is of says nothing to a mask but whether it is padding, so the last real tokens of a row stand
    for all that are left.
    """
    order = real.to(torch.int8).argsort(dim=1, stable=True)
    segments: list[Segment] = []
    last: PolicyLayer | None = None
    for layer in sorted(state.layers):
        keys = state.layers[layer]
        if last is not None and _alike(last, keys):
            continue
        width = keys.real.shape[1]
        slots = order[:, order.shape[1] - width :].to(keys.real.device)
        # padding stands where it stands: the n-th real key of a row is its n-th slot
        place = (keys.real.cumsum(1) - 1 + width - keys.real.sum(1, keepdim=True)).clamp(min=0)
        slots = slots.gather(1, place).masked_fill(~keys.real, -1)
        segments.append(Segment(layer, slots, keys.shift[0], bool((~keys.real).any()), keys.shift[1]))
        last = keys
    mark_pruned(cache, PrunedPrompt(tuple(segments), length))


def _alike(one: PolicyLayer, other: PolicyLayer) -> bool:
    same = one.real.shape == other.real.shape and one.shift[1] == other.shift[1]
    return same and torch.equal(one.real, other.real) and torch.equal(one.shift[0], other.shift[0])


def _held(state: PolicyState) -> dict[int, tuple[list[int], list[int]]]:
    """By layer, keys of each row that the next step reads, and that are stored."""
    layers = sorted(state.layers)
    read = torch.stack([state.layers[layer].real.sum(1).cpu() for layer in layers])
    waiting = torch.stack(
        [torch.zeros_like(read[0]) if (aside := state.layers[layer].aside) is None else aside.real.sum(1).cpu()
         for layer in layers]
    )  # fmt: skip
    return {layer: (read[i].tolist(), (read[i] + waiting[i]).tolist()) for i, layer in enumerate(layers)}
