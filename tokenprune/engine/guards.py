"""Uses of a wrapped model that could only go wrong, refused with a sentence before anything runs."""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

import torch

from tokenprune.hooks import Ledger, opaque
from tokenprune.interfaces.adapter import Adapter
from tokenprune.wrappers import runs_again


def _refuse_copies(label: str) -> Any:
    """What stands on a wrapped model in place of its copying and pickling: a copy would call the original's methods,
    for ever."""

    def refuse(*args: Any) -> NoReturn:
        raise TypeError(
            f"{label} is at work on this model object, and a copy or a pickle of it would not work alike. Call the "
            "handle's remove() first, or save its weights with save_pretrained() or state_dict()."
        )

    return refuse


class Guards:
    """Watches the calls of one model.

    Args:
        adapter: the model's family.
        label: the method, for messages.
        cuts_layers: whether a stage cuts inside the tower or the decoder.
        changes_attention: whether an intervention is at work.
    """

    def __init__(self, adapter: Adapter, label: str, cuts_layers: bool, changes_attention: bool) -> None:
        self._adapter, self._label = adapter, label
        self._cuts_layers, self._changes_attention = cuts_layers, changes_attention

    def install(self, ledger: Ledger) -> None:
        """Place the hooks; `ledger` takes them away."""
        model = self._adapter.model
        for module in (model, self._adapter.entry, self._adapter.language_model):
            for name in ("__deepcopy__", "__reduce_ex__"):
                ledger.set(module, name, _refuse_copies(self._label))
        blocks = (*self._adapter.layers, *self._adapter.vision.blocks) if self._cuts_layers else ()
        self._run_again = any(runs_again(model, block) for block in blocks)
        ledger.hook(model.register_forward_pre_hook(opaque(self._check), with_kwargs=True))

    def _check(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        wanted = kwargs.get("output_attentions")
        config = self._adapter.language_model.config
        if self._changes_attention and (getattr(config, "output_attentions", False) if wanted is None else wanted):
            raise ValueError(
                f"output_attentions=True wants the attention matrix of every layer, and {self._label} forms none where "
                "it acts. Leave it out, or remove the intervention."
            )
        if self._cuts_layers and module.training:
            self._check_checkpointing()

    def _check_checkpointing(self) -> None:
        again = self._run_again and torch.is_grad_enabled()
        for block in (*self._adapter.layers, *self._adapter.vision.blocks):
            again |= (
                block.training and getattr(block, "gradient_checkpointing", False) and _runs_hooks_again(type(block))
            )
        if again:
            raise ValueError(
                f"{self._label} cuts before a layer that gradient checkpointing runs a second time, with its hooks, "
                "after the prompt is forgotten. Switch gradient checkpointing off, put checkpoint wrappers around "
                "single layers, cut at 'input', or use a transformers release that keeps hooks outside of it (5.23 "
                "does)."
            )


def _runs_hooks_again(block: type) -> bool:
    """Whether a layer's class checkpoints its call, hooks included, and not its forward alone."""
    return any(
        "gradient_checkpointing" in inspect.getsource(cls.__call__)
        for cls in block.__mro__
        if "__call__" in vars(cls) and cls.__module__.startswith("transformers")
    )
