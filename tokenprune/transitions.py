"""What decoder layers do to the tokens on their way: signals read off their branches while they run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters._base import Adapter
from tokenprune.compaction import Compaction
from tokenprune.kernels.token_transition import token_transition
from tokenprune.ledger import Ledger
from tokenprune.opaque import opaque
from tokenprune.prompt import Prompt
from tokenprune.signals import (
    ATTENTION_COSINE,
    ATTENTION_GAIN,
    ATTENTION_TURN,
    MLP_COSINE,
    MLP_GAIN,
    MLP_TURN,
    TRANSITION_SIGNALS,
    Signal,
)

_NAMES = ((ATTENTION_GAIN, ATTENTION_COSINE, ATTENTION_TURN), (MLP_GAIN, MLP_COSINE, MLP_TURN))

Now = Callable[[], "tuple[Prompt, Tensor | None] | None"]


class Transitions:
    """Records transition signals of one pass over a prompt, by place in the rows as they stand now.

    Args:
        adapter: the family.
        wanted: signals that any stage asked for.
        now: the prompt that runs and which places of its rows are no padding (`[B, S]` bool, None: all); None while
            there is nothing to record, as in decoding.
    """

    def __init__(self, adapter: Adapter, wanted: Sequence[Signal], now: Now) -> None:
        self._adapter, self._now = adapter, now
        self._wanted: dict[int, set[str]] = {}
        for signal in wanted:
            if signal.name in TRANSITION_SIGNALS:
                self._wanted.setdefault(signal.layer, set()).add(signal.name)
        self._entered: tuple[Tensor, Tensor] | None = None
        self._values: dict[Signal, Tensor] = {}

    def install(self, ledger: Ledger) -> None:
        """Hook both branches of each layer that was asked for; `ledger` takes the hooks away."""
        for layer in self._wanted:
            attention, mlp = self._adapter.branches(self._adapter.layers[layer])
            ledger.hook(attention.register_forward_hook(opaque(self._after_attention), with_kwargs=True))
            after_mlp = opaque(functools.partial(self._after_mlp, layer))
            ledger.hook(mlp.register_forward_hook(after_mlp, with_kwargs=True))

    def forget(self) -> None:
        """A new call begins, or one has ended."""
        self._entered, self._values = None, {}

    def move(self, compaction: Compaction) -> None:
        """Tokens left the rows."""
        self._values = dict(zip(self._values, compaction.move(list(self._values.values()))))

    def value(self, signal: Signal, sample: int, places: Tensor) -> Tensor:
        """A signal of the tokens that stand at `places` `[n]` of a row now, `[n]` fp32."""
        return self._values[signal][sample, places]

    def _after_attention(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if self._now() is not None:
            self._entered = _first(args, kwargs), output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def _after_mlp(self, layer: int, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        now, entered, self._entered = self._now(), self._entered, None
        if now is None or entered is None:
            return
        prompt, attended = now
        with prompt.watch.running(output.device):
            gains, cosines = token_transition(*entered, _first(args, kwargs), output)
            for names, gain, cosine in zip(_NAMES, gains, cosines):
                turn = 1 - cosine
                if attended is not None:
                    turn = turn.masked_fill(~attended.to(output.device), -torch.inf)
                if prompt.drafted:
                    turn[:, -prompt.drafted :] = -torch.inf
                for name, values in zip(names, (gain, cosine, turn.softmax(dim=1))):
                    if name in self._wanted[layer]:
                        self._values[Signal(name, layer)] = values


def _first(args: Any, kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
