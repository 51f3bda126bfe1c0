"""What decoder layers do to the tokens on their way: signals read off their branches while they run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.hooks import Ledger, opaque
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.signals import (
    ATTENTION_COSINE,
    ATTENTION_GAIN,
    ATTENTION_TURN,
    MLP_COSINE,
    MLP_GAIN,
    MLP_TURN,
    TRANSITION_SIGNALS,
    Signal,
)
from tokenprune.kernels.token_transition import token_transition
from tokenprune.state.compaction import Compaction
from tokenprune.state.forward_call import Calls, ForwardCall

_NAMES = ((ATTENTION_GAIN, ATTENTION_COSINE, ATTENTION_TURN), (MLP_GAIN, MLP_COSINE, MLP_TURN))


class Transitions:
    """Records transition signals of one pass over a prompt, by place in the rows as they are now.

    Args:
        adapter: the family.
        wanted: signals that any stage asked for.
        calls: the calls at work; a call without a prompt, as in decoding, records nothing.
    """

    def __init__(self, adapter: Adapter, wanted: Sequence[Signal], calls: Calls) -> None:
        self._adapter, self._calls = adapter, calls
        self._wanted: dict[int, set[str]] = {}
        for signal in wanted:
            if signal.name in TRANSITION_SIGNALS:
                self._wanted.setdefault(signal.layer, set()).add(signal.name)

    def install(self, ledger: Ledger) -> None:
        """Hook both branches of each layer that was asked for; `ledger` takes the hooks away."""
        for layer in self._wanted:
            attention, mlp = self._adapter.branches(self._adapter.layers[layer])
            ledger.hook(attention.register_forward_hook(opaque(self._after_attention), with_kwargs=True))
            after_mlp = opaque(functools.partial(self._after_mlp, layer))
            ledger.hook(mlp.register_forward_hook(after_mlp, with_kwargs=True))

    def _at_work(self) -> ForwardCall | None:
        call = self._calls.now
        return None if call is None or call.prompt is None or call.decoder is None else call

    def move(self, compaction: Compaction) -> None:
        """Tokens left the rows."""
        call = self._at_work()
        if call is not None:
            call.transitions = dict(zip(call.transitions, compaction.move(list(call.transitions.values()))))

    def value(self, signal: Signal, sample: int, places: Tensor) -> Tensor:
        """A signal of the tokens that are at `places` `[n]` of a row now, `[n]` fp32."""
        call = self._at_work()
        if call is None:
            raise ValueError(f"{signal.name} is there while a prompt passes through the decoder, and none does.")
        return call.transitions[signal][sample, places]

    def _after_attention(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        call = self._at_work()
        if call is not None:
            call.branch = _first(args, kwargs), output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def _after_mlp(self, layer: int, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        call = self._at_work()
        if call is None or call.branch is None or call.prompt is None or call.decoder is None:
            return
        (prompt, attended), entered, call.branch = (call.prompt, call.decoder.attended), call.branch, None
        with prompt.timer.running(output.device):
            gains, cosines = token_transition(*entered, _first(args, kwargs), output)
            for names, gain, cosine in zip(_NAMES, gains, cosines):
                turn = 1 - cosine
                if attended is not None:
                    turn = turn.masked_fill(~attended.to(output.device), -torch.inf)
                if prompt.drafted:
                    turn[:, -prompt.drafted :] = -torch.inf
                for name, values in zip(names, (gain, cosine, turn.softmax(dim=1))):
                    if name in self._wanted[layer]:
                        call.transitions[Signal(name, layer)] = values


def _first(args: Any, kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
