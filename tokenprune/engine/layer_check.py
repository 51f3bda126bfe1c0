"""What `apply` asks of a decoder before a method reads its layers: is a layer what the adapter takes it for?

A layer that a method reads is run by itself on a few random hidden states, and what is read off it (queries, keys,
values, rotation, scale; its two branches) must give what it computed. That is checked of the loaded module, whatever
its class. Where weights are not there to run a layer with (on the meta device, or sharded), the names of its parts are
all that can be checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.engine.whole_masks import RECURRENT
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.attention_reading import output_of
from tokenprune.interfaces.capability import DECODER_SIGNALS, INPUT_CUTS, LAYER_CUTS
from tokenprune.interfaces.pruner import Stage
from tokenprune.interfaces.signals import DECODER_SIGNALS as READ_SIGNALS
from tokenprune.interfaces.signals import TRANSITION_SIGNALS

_TOKENS = 8
_KINDS = ("", "full_attention", "sliding_attention", "chunked_attention", "indexed_attention", *RECURRENT)
_INSTEAD = (
    "Methods that cut at 'input' or before it and read nothing of the decoder work on this model (uniform, holov, "
    "todre with fade=False)."
)


def check_decoder_reads(adapter: Adapter, stages: Sequence[Stage], changed: Sequence[int] = ()) -> None:
    """Check what a plan needs of the decoder.

    It takes a pass of a few tokens through each layer that is read, draws no random numbers from torch's generators,
    and leaves the model as it was.

    Args:
        adapter: the model's family.
        stages: the plan.
        changed: layers whose attention an intervention changes.

    Raises:
        ValueError: the decoder cannot be pruned, or a layer is not laid out as it would be read.
    """
    signals = {signal for stage in stages for signal in stage.signals(adapter.tower)}
    attention = {signal.layer: "its attention" for signal in signals if signal.name in READ_SIGNALS}
    branches = {signal.layer for signal in signals if signal.name in TRANSITION_SIGNALS}
    if not attention and not branches and not changed:
        return
    _check_whole(adapter)
    if any(s.name in READ_SIGNALS for stage in stages if stage.place == "input" for s in stage.signals(adapter.tower)):
        _checked(adapter, 0, "reads what enters", _check_entrance)
    for layer in sorted(attention):
        _checked(adapter, layer, "reads the attention of", _check_attention)
    for layer in sorted(branches):
        _checked(adapter, layer, "reads both branches of", _check_branches)
    alike = {(adapter.layer_kind(layer), type(adapter.layers[layer])): layer for layer in reversed(changed)}
    for layer in sorted(set(alike.values()) - set(attention)):
        _checked(adapter, layer, "changes the attention of", _check_attention)


def check_places(adapter: Adapter, stages: Sequence[Stage]) -> None:
    """Raise ValueError unless tokens can leave this decoder's rows: it takes position ids, and its layers attend."""
    if not stages:
        return
    decoder = adapter.language_model
    if not hasattr(decoder, "rotary_emb"):
        raise ValueError(
            f"{type(decoder).__name__} has no rotary positions (rotary_emb): where its tokens stand is learnt or "
            f"follows from their distance in the row, which changes when others leave, so it has no {INPUT_CUTS}. Use "
            "a model with another decoder."
        )
    others = sorted({adapter.layer_kind(layer) for layer in range(len(adapter.layers))} - set(_KINDS))
    if others:
        raise ValueError(
            f"{type(decoder).__name__} has layers of the kind {', '.join(others)}, in which taking tokens out is not "
            f"hiding them from attention, so it has no {INPUT_CUTS}. Use a model with another decoder."
        )
    _check_shared_keys(adapter, stages)


def _check_shared_keys(adapter: Adapter, stages: Sequence[Stage]) -> None:
    """Raise ValueError where a cut comes after a layer whose keys later layers attend to: those would be of other
    tokens, and for a single answer later layers run the last token alone."""
    layers = range(len(adapter.layers))
    first = min((adapter.key_layer(layer) for layer in layers if adapter.key_layer(layer) != layer), default=None)
    if first is None:
        return
    for stage in stages:
        if stage.place == "layer" and stage.depth > first:
            raise ValueError(
                f"{stage.pruner.name} cuts at {stage.site!r}, and later layers of "
                f"{type(adapter.language_model).__name__} attend to the keys of layer {first}, which holds the tokens "
                f"of before that cut, so it has no {LAYER_CUTS} there. Cut at 'layer:{first}' or before."
            )


def unread_layers(adapter: Adapter) -> dict[int, str]:
    """Decoder layers of which queries, keys and values cannot be read, and why; {} if all can."""
    found = {}
    for layer, module in enumerate(adapter.layers):
        try:
            with undisturbed(module):
                _check_attention(adapter, layer)
        except Exception as error:  # as in `_checked`
            found[layer] = str(error).partition("\n")[0]
    return found


def _check_whole(adapter: Adapter) -> None:
    """Raise ValueError if this process has only some heads of each layer."""
    size = getattr(adapter.model, "_tp_size", None) or getattr(adapter.model, "tp_size", None) or 1
    if size > 1:
        raise ValueError(
            f"The model is split by tensor parallelism over {size} processes, each of which has some heads of a layer "
            f"and would choose by those. {_INSTEAD}"
        )


def _checked(adapter: Adapter, layer: int, does: str, check: Any) -> None:
    module = adapter.layers[layer]
    try:
        with undisturbed(module):
            check(adapter, layer)
    except Exception as error:
        # whatever a layer of an unknown kind raises when it is called in this way
        raise ValueError(
            f"The method {does} decoder layer {layer} ({type(module).__name__} of "
            f"{type(adapter.language_model).__name__}), which is not laid out as it would be read: "
            f"{str(error).rstrip('.')}. It has no {DECODER_SIGNALS} there. {_INSTEAD}"
        ) from error


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Run a layer as in evaluation, without gradients, autocast and the hooks of others, and leave it as it was."""
    modes = [(part, part.training) for part in module.modules()]
    placed = [hooks for part, _ in modes for hooks in (part._forward_hooks, part._forward_pre_hooks)]
    before = [dict(hooks) for hooks in placed]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", *(weight.device.type for weight in module.parameters())} - {"meta"}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        for part, _ in modes:
            part.training = False
        for hooks in placed:
            hooks.clear()
        try:
            yield
        finally:
            for part, mode in modes:
                part.training = mode
            for hooks, hooks_before in zip(placed, before):
                hooks.update(hooks_before)


def _check_attention(adapter: Adapter, layer: int) -> None:
    module = adapter.layers[layer]
    reading = adapter.reading(module)
    exit = output_of(reading.attention)
    if not there(module):
        return
    seen: list[Tensor] = []
    with hooked(exit.register_forward_pre_hook(lambda _, args: seen.append(args[0]))):
        hidden, rotation, _ = _run(adapter, layer)
    if isinstance(rotation, Tensor):
        raise ValueError("its queries and keys are rotated by complex numbers")
    truth = seen[0].flatten(2) if seen[0].dim() == 4 else seen[0]
    query, key, value = (reading.heads(hidden, part) for part in "qkv")
    query, key = reading.rotate(query, rotation), reading.rotate(key, rotation)
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1).float() for part in (key, value))
    scores = (query.float() @ key.transpose(2, 3)) * reading.scale
    hides = torch.ones(_TOKENS, _TOKENS, dtype=torch.bool, device=scores.device).triu(1)
    mixed = scores.masked_fill(hides, float("-inf")).softmax(-1) @ value
    _check_close("its query, key, value, rotation and scale", mixed.transpose(1, 2).flatten(2), truth)


def _check_entrance(adapter: Adapter, layer: int) -> None:
    """Embeddings that the decoder is given must enter its first layer as they are, with the rotation of its own."""
    module, decoder = adapter.layers[layer], adapter.language_model
    if not there(module):
        return
    hidden, positions = _hidden(adapter), torch.arange(_TOKENS)[None]
    found: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        found.append((args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"]))
        raise _Entered

    with (
        undisturbed(decoder),
        hooked(module.register_forward_pre_hook(stop, with_kwargs=True)),
        suppress(_Entered),
    ):
        decoder.forward(inputs_embeds=hidden, use_cache=False)
    entered, rotation = found[0]
    if not torch.equal(entered, hidden):
        raise ValueError("the embeddings that the decoder is given are changed before they enter it")
    positions = positions.to(hidden.device)
    mine = adapter.rotary(hidden, adapter.position_ids(positions), layer)
    if not all(torch.equal(one.expand_as(other), other) for one, other in zip(mine, rotation)):
        raise ValueError("it is given another rotation than the decoder's own of the position ids")


class _Entered(Exception):
    """A layer was reached, and need not run."""


def _check_branches(adapter: Adapter, layer: int) -> None:
    module = adapter.layers[layer]
    parts = adapter.branches(module)
    if not there(module):
        return
    entered: list[Tensor] = []
    made: list[Any] = []

    def keep(branch: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if branch is not parts[len(made)]:
            raise ValueError(f"{type(parts[1]).__name__} runs before {type(parts[0]).__name__}")
        entered.append(args[0] if args else kwargs["hidden_states"])
        added: Any = output[0] if isinstance(output, tuple) and branch is parts[0] else output
        made.append(added)

    with hooked(*(part.register_forward_hook(keep, with_kwargs=True) for part in parts)):
        hidden, _, output = _run(adapter, layer)
    if torch.equal(entered[0], hidden):
        raise ValueError(f"{type(parts[0]).__name__} gets states that no norm has gone over")
    _check_close("what its attention and its MLP add to the residual", hidden + made[0] + made[1], output)


def _check_close(what: str, mine: Tensor, truth: Tensor) -> None:
    if mine.shape != truth.shape:
        raise ValueError(f"{what} give {tuple(mine.shape)}, and the layer has {tuple(truth.shape)}")
    error = float((mine.double() - truth.double()).norm() / truth.double().norm())
    bound = max(1e-3, 8 * torch.finfo(truth.dtype).eps)
    if not error < bound:
        raise ValueError(
            f"{what} do not give what the layer computed (relative error {error:.1e}, at most {bound:.1e} is rounding)"
        )


def there(module: nn.Module) -> bool:
    """Whether a layer's weights are here: not on the meta device, which offloading leaves behind, and not sharded."""
    return not any(weight.is_meta or hasattr(weight, "placements") for weight in module.parameters())


@contextmanager
def hooked(*hooks: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hidden(adapter: Adapter, layer: int = 0) -> Tensor:
    """A few random hidden states `[1, S, D]` on the device of a layer."""
    decoder = adapter.language_model
    weight = next(part for part in adapter.layers[layer].parameters() if part.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _TOKENS, decoder.config.hidden_size, generator=generator, device="cpu")
    return hidden.to(device=weight.device, dtype=decoder.dtype)


def _run(adapter: Adapter, layer: int) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Run a layer on a few random hidden states, past the hooks that others placed on it: what entered it `[1, S, D]`,
    the rotation, and what it made of them."""
    module, decoder = adapter.layers[layer], adapter.language_model
    hidden = _hidden(adapter, layer)
    positions = torch.arange(_TOKENS, device=hidden.device)[None]
    try:
        rotation = adapter.rotary(hidden, adapter.position_ids(positions), layer)
    except (KeyError, AttributeError) as error:
        kind = adapter.layer_kind(layer)
        raise ValueError(f"the decoder has no rotation for layers of the kind {kind!r} ({error})") from error
    mask = None  # flash attention is causal without one
    attention = getattr(decoder.config, "_attn_implementation", None) or "eager"
    if attention == "eager":
        low = torch.full((1, 1, _TOKENS, _TOKENS), torch.finfo(hidden.dtype).min, device=hidden.device)
        mask = low.triu(1).to(hidden.dtype)
    elif attention == "sdpa":  # without one, layers whose pictures see themselves both ways see all
        mask = torch.ones(1, 1, _TOKENS, _TOKENS, dtype=torch.bool, device=hidden.device).tril()
    output = module.forward(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotation)
    return hidden, rotation, output[0] if isinstance(output, tuple) else output
