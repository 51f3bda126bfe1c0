"""Outputs of a pruned prompt, by the places that the caller counts.

Rows of a pruned prompt are shorter than what the caller gave, with their right ends lined up where the caller's are. A
caller that counts from the right end sees no difference. One that counts otherwise, or holds labels against logits, is
handed full-length rows: at a place that left stands what the last place before it that stayed says, so that a text
token is predicted by the last kept token before it, as in a prompt that never had the dropped ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.hooks import Ledger, opaque
from tokenprune.state.compaction import Compaction
from tokenprune.state.forward_call import Calls, ForwardCall

OUTPUTS = ("auto", "full", "kept")


class Outputs:
    """Begins and ends a call of the model, and sees to it that labels and outputs line up.

    Args:
        calls: the calls at work.
        mode: "full" for full-length rows always, "kept" never, "auto" where the caller may count places otherwise than
            from the right end.
    """

    def __init__(self, calls: Calls, mode: str = "auto") -> None:
        self._calls, self._mode = calls, mode
        self._parameters: list[str] = []
        self._trained = False  # whether the model was trained since; who evaluates it then holds labels against logits

    def install(self, model: Any, ledger: Ledger) -> None:
        """Hook the model that computes logits and loss; `ledger` takes the hooks away."""
        self._parameters = list(inspect.signature(model.forward).parameters)
        ledger.hook(model.register_forward_pre_hook(opaque(self._begin), with_kwargs=True))
        ledger.hook(model.register_forward_hook(opaque(self._end), always_call=True))

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._calls.begin(module)
        call.arguments = {**dict(zip(self._parameters, args)), **kwargs}
        given = {name: call.arguments.get(name) for name in ("labels", "shift_labels")}
        # copies, in which labels of tokens that leave are struck out before the loss is computed
        call.labels = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
        return ((), {**call.arguments, **call.labels}) if call.labels else None

    def _end(self, module: Any, args: Any, output: Any) -> None:
        self._calls.end(module)

    def full_length(self, call: ForwardCall, model: Any) -> bool:
        """Whether this call's outputs are handed back by the places of the full rows."""
        given, keep = call.arguments, call.arguments.get("logits_to_keep", 0)
        labelled = any(given.get(name) is not None for name in ("labels", "shift_labels"))
        if self._mode != "auto":
            return self._mode == "full" or labelled
        self._trained |= model.training and torch.is_grad_enabled()
        if labelled or call.module is not model or given.get("output_hidden_states"):
            return True
        if isinstance(keep, int) and keep == 1:  # the last column stays the last
            return False
        by_place = isinstance(keep, Tensor) or keep > 1 or given.get("use_cache") is False or model.training
        by_place |= self._trained and self._calls.generation is None
        return by_place or (call.prompt is not None and not call.prompt.pad_left)


def restore(output: Any, moves: Sequence[tuple[int, Compaction]]) -> None:
    """Put a decoder's output at full length, in place.

    Args:
        output: with `last_hidden_state` `[B, P, D]`, and `hidden_states`, if there are any, of each layer.
        moves: the layer before which rows were shortened, and how they stood to the full rows from then on.
    """
    output.last_hidden_state = moves[-1][1].restore(output.last_hidden_state)
    states = getattr(output, "hidden_states", None)
    if states is None:
        return
    full = []
    for layer, rows in enumerate(states):
        # what enters layer K is written down before or after the cut there
        fitting = [move for first, move in moves if first <= layer and move.index.shape[1] == rows.shape[1]]
        full.append(fitting[-1].restore(rows) if fitting else rows)
    output.hidden_states = tuple(full)


def strike_out(labels: Mapping[str, Tensor], compaction: Compaction, ignore_index: int = -100) -> None:
    """Take labels `[B, S]` of tokens that left out of the loss, in place; `shift_labels` have that of a token one place
    before it."""
    counted = compaction.counted()
    for name, given in labels.items():
        own = counted.to(given.device)
        if name == "shift_labels":
            own = torch.cat([own[:, 1:], torch.ones_like(own[:, :1])], dim=1)  # what follows the row is not known here
        given.masked_fill_(~own, ignore_index)
