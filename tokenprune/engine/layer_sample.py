"""A trial of a decoder runs some layers for all that are alike: what cuts do to a layer follows from its code and its
settings, not from its weights.

Layers count as alike where their modules have the same classes, shapes of weights, settings and kind of mask, whatever
their number. The first and the last layer of the decoder run, those before which tokens leave, and of each kind two at
least; the others hand on what they are given. Code that comes with a checkpoint may do something of its own in any
layer, so there all of them run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tokenprune.hooks import Ledger
from tokenprune.interfaces.adapter import Adapter

_OF_EACH = 2  # layers of a kind that run
_LIBRARY = "transformers.models."
_NUMBERS = ("layer_idx", "layer_number", "layer_id", "training")


def sampled_layers(adapter: Adapter, cuts: Sequence[int] = ()) -> list[int]:
    """Layers that a trial with cuts before some layers runs, ascending: all where a layer attends to the keys of
    another, or the decoder is none of transformers' own."""
    count = len(adapter.layers)
    own = type(adapter.language_model).__module__.startswith(_LIBRARY)
    if not own or any(adapter.key_layer(layer) != layer for layer in range(count)):
        return list(range(count))
    runs = {0, count - 1, *(cut for cut in cuts if cut < count)}
    kinds = [kind_of(adapter, layer) for layer in range(count)]
    for kind in dict.fromkeys(kinds):
        alike = [layer for layer in range(count) if kinds[layer] == kind]
        runs.add(alike[0])  # how many tokens a cache holds is read off the first layer of a kind
        there = runs.intersection(alike)
        runs.update([layer for layer in alike if layer not in there][: max(0, _OF_EACH - len(there))])
    return sorted(runs)


def kind_of(adapter: Adapter, layer: int) -> tuple[Any, ...]:
    """What layers that are alike have in common."""
    modules = [(name, type(part), _settings(part)) for name, part in adapter.layers[layer].named_modules()]
    return (adapter.layer_kind(layer), tuple(modules))


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Plain settings of a module, shapes of its weights, and the names of what else was put on it."""
    found = []
    for name, value in sorted(vars(module).items()):
        if name in _NUMBERS or name.startswith("_") and name != "_parameters":
            continue
        if name == "_parameters":
            value = tuple((key, None if own is None else tuple(own.shape)) for key, own in value.items())
        elif isinstance(value, (list, tuple, dict)):
            value = repr(value)
        elif not isinstance(value, (bool, int, float, str, type(None))):
            value = type(value)
        found.append((name, value))
    return tuple(found)


@contextmanager
def only(adapter: Adapter, layers: Sequence[int]) -> Iterator[None]:
    """Run some layers of a decoder alone; the others hand on their states in the form in which those answer, unless
    that holds more than the states.

    Args:
        layers: that run, the first one among them.
    """
    ledger, forms = Ledger(), _Forms()
    try:
        for number, layer in enumerate(adapter.layers):
            does = forms.noted if number in layers else forms.handed_on
            ledger.set(layer, "forward", functools.partial(does, layer.forward))
        yield
    finally:
        ledger.undo()


class _Forms:
    """In what form the layers of a decoder answer."""

    def __init__(self) -> None:
        self._behind: tuple[Any, ...] | None = None  # what stands behind the states; None: they stand alone

    def noted(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        made = forward(*args, **kwargs)
        self._behind = None if isinstance(made, Tensor) else made[1:]
        return made

    def handed_on(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs.get("hidden_states")
        if states is None or any(part is not None for part in self._behind or ()):
            return forward(*args, **kwargs)
        return states if self._behind is None else (states, *self._behind)
