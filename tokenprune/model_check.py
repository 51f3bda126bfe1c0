"""What a checkpoint can do, found out of the loaded model: the five capabilities, and how far a pruned prompt is from
the same prompt in which the dropped tokens are hidden by a mask."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.api import prepare
from tokenprune.engine.decoder_probe import hide, passed_by, removal_error
from tokenprune.engine.layer_check import hooked, undisturbed, unread_layers
from tokenprune.engine.whole_masks import RECURRENT
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.capability import DECODER_SIGNALS, INPUT_CUTS, LAYER_CUTS, TOWER_CUTS, TOWER_SIGNALS


@dataclass(frozen=True)
class Finding:
    """One capability of a model.

    Attributes:
        name: see `tokenprune.interfaces.capability`.
        has: whether the model has it, for some layers at least.
        says: what was found.
    """

    name: str
    has: bool
    says: str


def capabilities_of(adapter: Adapter, inputs: Mapping[str, Any] | None = None) -> list[Finding]:
    """What a loaded model can do; it takes passes of a few tokens through the decoder.

    Args:
        inputs: of a prompt with a picture, on which a tower that no test knows is tried; without them it is only said
            that its blocks can be reached.
    """
    middle = max(adapter.first_cut, len(adapter.layers) // 2)
    unread = unread_layers(adapter)
    layers = len(adapter.layers)
    reads = f"{layers - len(unread)} of {layers} layers read right"
    if unread:
        first, why = next(iter(unread.items()))
        reads += f"; layer {first}: {why}"
    return [
        _cuts(adapter, INPUT_CUTS, ()),
        _cuts(adapter, LAYER_CUTS, (middle,)),
        Finding(DECODER_SIGNALS, len(unread) < layers, reads),
        _tower(adapter, inputs),
        _tower_cuts(adapter, inputs),
    ]


def _tower(adapter: Adapter, inputs: Mapping[str, Any] | None) -> Finding:
    signals = ", ".join(adapter.vision.signals)
    if not signals:
        return Finding(TOWER_SIGNALS, False, _unread(adapter))
    if not adapter.behind_tower:
        return Finding(TOWER_SIGNALS, True, signals)
    if inputs is None:
        return Finding(TOWER_SIGNALS, True, f"{signals}; they are tried at the first picture")
    says = _refused_at_a_picture(adapter, inputs, "vtc_cls", 0.25)
    return Finding(TOWER_SIGNALS, not says, says or signals)


def _unread(adapter: Adapter) -> str:
    """Why a tower without a file is not read."""
    latents = adapter.latents
    if latents:
        return (
            f"{latents} makes visual tokens that look at all of a picture, so which patches are a token's cannot be "
            "said, and the tower is not read"
        )
    if type(adapter).visuals is not Adapter.visuals and not adapter.behind_tower:
        return f"the family file {adapter.name!r} lays its pictures out and does not say how its tower is read"
    return "a family file would have to say where they are"


def _tower_cuts(adapter: Adapter, inputs: Mapping[str, Any] | None) -> Finding:
    if not adapter.vision.can_cut:
        return Finding(TOWER_CUTS, False, _unread(adapter) if not adapter.vision.signals else "its adapter says so")
    last = adapter.tower.feature_layer
    where = f"after blocks 0 to {last - 1}"
    if not adapter.behind_tower:
        return Finding(TOWER_CUTS, True, where)
    if inputs is None:
        return Finding(TOWER_CUTS, True, f"{where}; they are tried at the first picture")
    says = _refused_at_a_picture(adapter, inputs, {"at": "vision:0", "prune": "random", "keep": 0.25}, None)
    return Finding(TOWER_CUTS, not says, says or where)


def _refused_at_a_picture(adapter: Adapter, inputs: Mapping[str, Any], method: Any, keep: float | None) -> str:
    """What is said of a method at the first picture; "" if it runs and what is tried of the tower verifies."""
    try:
        with torch.no_grad(), prepare(adapter.model, method, keep, adapter=adapter).applied():
            adapter.model(**inputs)
    except ValueError as raised:
        return str(raised)
    return ""


def _cuts(adapter: Adapter, name: str, layers: tuple[int, ...]) -> Finding:
    at = f"at the input and before layer {layers[0]}" if layers else "at the input"
    try:
        with undisturbed(adapter.language_model):
            error = removal_error(adapter, layers)
    except Exception as raised:  # whatever a decoder of an unknown kind raises when it is called in this way
        says = str(raised).partition("\n")[0]
        if not isinstance(raised, ValueError):  # not a sentence of ours
            kind = type(adapter.language_model).__name__
            says = f"{kind}, called with random embeddings {at}, raised {type(raised).__name__}: {says}"
        return Finding(name, False, says)
    bound = max(1e-3, 16 * torch.finfo(adapter.language_model.dtype).eps)
    return Finding(name, error < bound, f"{at}, removing is {error:.1e} from hiding ({bound:.1e} is rounding)")


@dataclass(frozen=True)
class PromptError:
    """One prompt, pruned at the input by `random`.

    Attributes:
        kept, visual: visual tokens that stayed, of how many.
        error: relative error of the last row of logits against those of the masked model.
        unpruned: that of the unpruned model against the same, for comparison.
    """

    kept: int
    visual: int
    error: float
    unpruned: float


def prompt_error(model: Any, adapter: Adapter, inputs: Mapping[str, Any], keep: int | float = 0.25) -> PromptError:
    """Prune a prompt, and hide the tokens that left in the whole model.

    Args:
        inputs: of one prompt with a picture, without padding.
    """

    def last(**more: Any) -> Tensor:
        return model(**inputs, **more).logits[:, -1].double()

    with torch.no_grad():
        with prepare(model, "random", keep, adapter=adapter, positions="keep").applied() as handle:
            pruned = last()
            seen, report = handle.stays, handle.report()
        plain = last(use_cache=False)
        seen = seen.to(plain.device)
        kinds = [adapter.layer_kind(layer) in RECURRENT for layer in range(len(adapter.layers))]
        hooks = [
            layer.register_forward_pre_hook(functools.partial(hide, 0, [seen]), with_kwargs=True)
            for layer, along in zip(adapter.layers, kinds)
            if not along
        ]
        with hooked(*hooks), passed_by([(layer, seen) for layer, along in zip(adapter.layers, kinds) if along]):
            masked = last(use_cache=False)
    apart = [float((logits - masked).norm() / masked.norm()) for logits in (pruned, plain)]
    return PromptError(report.kept_tokens, report.visual_tokens, *apart)
