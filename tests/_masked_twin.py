"""A model in which the tokens that a pruned run dropped are hidden: it can stand wherever the pruned one stood.

`MaskedModel` answers one batch. The twin answers every call that somebody else's training loop makes, at
full length and in the order in which the pruned model made them, so that whole runs can be compared: losses, gradients,
weights. It shares no code with the engine but the layout of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from masked_reference import kinds_of, masked_tower
from torch import Tensor


class _Hidden:
    """What is hidden from one prompt: for each layer, which places of the row stay and how far positions close."""

    def __init__(self, prompt: Any, policies: dict[str, str], layers: int) -> None:
        layout = prompt.layout
        stays = torch.ones(layout.batch_size, layout.length, dtype=torch.bool)
        closed = torch.zeros_like(stays, dtype=torch.int64)
        self.by_layer = [(stays, closed)] * layers
        self.tower = kinds_of(prompt)
        for cut in prompt.cuts:
            before, stays = stays, stays.clone()
            for span, tokens in zip(layout.spans, cut.tokens):
                if tokens is not None:
                    stays[span.sample, span.places] = False
                    stays[span.sample, span.places[tokens]] = True
            if policies[cut.site] == "compact":
                closed = closed + (before & ~stays).cumsum(1)
            first = int(cut.site.partition(":")[2]) if cut.site.startswith("layer") else 0
            self.by_layer[first:] = [(stays, closed)] * (layers - first)
        self.stays = stays

    def longer(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """The same of a row that goes on with an answer."""
        stays, closed = self.by_layer[layer]
        more = length - stays.shape[1]
        stays = torch.nn.functional.pad(stays, (0, more), value=True)
        return stays, torch.cat([closed, closed[:, -1:].expand(-1, more)], dim=1)


def spoken_for(stays: Tensor, attended: Tensor) -> list[list[int]]:
    """For each row, the place whose output stands at each place: its own, or the last one before it that stayed."""
    found = []
    for row in range(stays.shape[0]):
        places, last = [], None
        for place in range(stays.shape[1]):
            if stays[row, place]:
                last = place if attended[row, place] else last
                places.append(place)
            else:
                places.append(place if last is None else last)
        found.append(places)
    return found


def unpredicted(stays: Tensor, attended: Tensor) -> Tensor:
    """`[B, S]` bool: places that no loss may count. They left, or no token is before them to predict them from."""
    out = ~stays
    for row in range(stays.shape[0]):
        real = (stays[row] & attended[row]).nonzero()[:, 0]
        out[row, real[:1]] = True
    return out


@contextmanager
def masked(model: Any, adapter: Any, passes: Sequence[Any], policies: dict[str, str]) -> Iterator[list[Any]]:
    """Hide from `model` in each of its calls what left in the next of `passes`; yields those that are to come.

    Args:
        model: unpruned; the transformers model, not a wrapper.
        adapter: its own adapter.
        passes: what `Handle.watch` collected on the pruned model. A call of `generate` is one of them, whatever number
            of forward calls it makes; it must be told to use no cache.
        policies: by site, "compact" or "keep".
    """
    coming, layers, tower = list(passes), adapter.layers, ExitStack()
    now: dict[str, Any] = {"hidden": None, "generating": False, "attended": None}
    handles = []

    def next_one() -> _Hidden:
        return _Hidden(coming.pop(0)._prompt, policies, len(layers))

    def attended(kwargs: dict[str, Any]) -> Tensor:
        mask = kwargs.get("attention_mask")
        return torch.ones_like(kwargs["input_ids"]).bool() if mask is None else mask.bool()

    def take_labels(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("labels") is None or kwargs.get("pixel_values") is None:
            return None
        there = attended(kwargs)
        stays, _ = _Hidden(coming[0]._prompt, policies, len(layers)).longer(-1, there.shape[1])
        return args, {**kwargs, "labels": kwargs["labels"].masked_fill(unpredicted(stays, there), -100)}

    def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        assert not args
        if kwargs.get("pixel_values") is None and kwargs.get("mm_encoder_outputs") is None:
            now["hidden"] = None
            return
        if not now["generating"]:
            now["hidden"] = next_one()
            tower.enter_context(masked_tower(adapter, now["hidden"].tower))
        now["attended"] = attended(kwargs)

    def leave(module: Any, args: Any, output: Any) -> None:
        tower.close()

    def enter_decoder(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if now["hidden"] is None:
            return None
        length = kwargs["inputs_embeds"].shape[1]
        given = kwargs.get("position_ids")
        now["positions"] = torch.arange(length)[None] if given is None else given
        return args, {**kwargs, "position_ids": now["positions"] - now["hidden"].longer(0, length)[1]}

    def enter_layer(layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if now["hidden"] is None:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        length = x.shape[1]
        stays, closed = now["hidden"].longer(layer, length)
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & (stays & now["attended"])[:, None]
        # padding, and tokens that left before all others, see themselves: a softmax needs a key
        allowed = allowed | (torch.eye(length, dtype=torch.bool) & ~allowed.any(-1, keepdim=True))
        changed = {**kwargs, "attention_mask": allowed[:, None]}
        if not torch.equal(closed, now["hidden"].longer(0, length)[1]):
            changed["position_ids"] = now["positions"] - closed
            changed["position_embeddings"] = adapter.rotary(x, changed["position_ids"], layer)
        return args, changed

    def leave_decoder(module: Any, args: Any, output: Any) -> None:
        if now["hidden"] is None:
            return
        stays, _ = now["hidden"].longer(-1, now["attended"].shape[1])
        index = torch.tensor(spoken_for(stays, now["attended"]))
        rows = torch.arange(len(index))[:, None]
        output.last_hidden_state = output.last_hidden_state[rows, index]

    generate = model.generate

    def generating(*args: Any, **kwargs: Any) -> Any:
        now["hidden"], now["generating"] = next_one(), True
        try:
            with masked_tower(adapter, now["hidden"].tower):
                return generate(*args, **kwargs, use_cache=False)
        finally:
            now["hidden"], now["generating"] = None, False

    model.generate = generating
    handles.append(model.register_forward_pre_hook(take_labels, with_kwargs=True))
    handles.append(adapter.entry.register_forward_pre_hook(enter, with_kwargs=True))
    handles.append(adapter.language_model.register_forward_pre_hook(enter_decoder, with_kwargs=True))
    handles.append(adapter.entry.register_forward_hook(leave, always_call=True))
    for number, layer in enumerate(layers):
        handles.append(
            layer.register_forward_pre_hook(lambda m, a, k, n=number: enter_layer(n, m, a, k), with_kwargs=True)
        )
    handles.append(adapter.language_model.register_forward_hook(leave_decoder))
    try:
        yield coming
    finally:
        for handle in handles:
            handle.remove()
        del model.generate
