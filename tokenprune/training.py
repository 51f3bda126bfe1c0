"""The training loss of a pruned prompt: labels count every token, its logits do not."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tokenprune.compaction import Compaction
from tokenprune.ledger import Ledger
from tokenprune.opaque import opaque


class LossAfterPruning:
    """Takes `labels` out of a forward call and computes the loss once logits and labels have one length.

    A text label is predicted by the last kept token before it, as in a prompt that never had the dropped ones.

    Args:
        compaction: gives how the current call was shortened, or None if it was not.
    """

    def __init__(self, compaction: Callable[[], Compaction | None]) -> None:
        self._compaction = compaction
        self._parameters: list[str] = []
        self._labels: Tensor | None = None
        self._arguments: dict[str, Any] = {}

    def install(self, model: Any, ledger: Ledger) -> None:
        """Hook the model that computes the loss."""
        self._parameters = list(inspect.signature(model.forward).parameters)
        ledger.hook(model.register_forward_pre_hook(opaque(self._take_labels), with_kwargs=True))
        ledger.hook(model.register_forward_hook(opaque(self._give_loss)))

    def _take_labels(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = {**dict(zip(self._parameters, args)), **kwargs}
        self._labels = call.get("labels")
        if self._labels is None:
            return None
        self._arguments = {name: call[name] for name in ("num_items_in_batch", "shift_labels") if name in call}
        return (), {**call, "labels": None}

    def _give_loss(self, module: Any, args: Any, output: Any) -> Any:
        labels, self._labels = self._labels, None
        if labels is None:
            return None
        compaction = self._compaction()
        if compaction is not None:
            if self._arguments.get("shift_labels") is not None:
                raise ValueError(
                    "shift_labels are by place, and pruning moves tokens, so that a label may lose the one that it was "
                    "shifted to. Pass labels alone."
                )
            labels = compaction.labels(labels)
        is_tuple = isinstance(output, tuple)
        logits = output[0] if is_tuple else output.logits
        vocab_size = module.config.get_text_config().vocab_size
        loss = module.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **self._arguments)
        return (loss, *output) if is_tuple else dataclasses.replace(output, loss=loss)
