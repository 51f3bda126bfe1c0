"""The two calls of the library: `apply` and `applied`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenprune.engine.engine import Engine
from tokenprune.engine.guards import Guards
from tokenprune.engine.layer_check import check_decoder_reads
from tokenprune.engine.outputs import OUTPUTS
from tokenprune.handle import Handle
from tokenprune.hooks import Ledger
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.pruner import Stage
from tokenprune.plan.parse import Spec, parse_method
from tokenprune.registry import MODELS, near
from tokenprune.seams import check_seams
from tokenprune.wrappers import unwrap

# text, not handles: a handle refers to its model, which would then never be freed
_applied: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def adapter_for(model: Any) -> Adapter:
    """The adapter that covers `model`'s class.

    Raises:
        TypeError: no adapter does; the message lists what is supported.
        ImportError: the installed torch or transformers lacks what the library needs of it.
    """
    names = [cls.__name__ for cls in type(model).__mro__]
    families = {name: MODELS.get(name) for name in MODELS.names()}
    for family in families.values():
        if any(name in family.classes for name in names):
            check_seams(model)
            return family(model)
    supported = sorted(name for family in families.values() for name in family.classes)
    raise TypeError(
        f"No adapter covers a {names[0]}.{near(names[0], supported)} Supported classes: {', '.join(supported)}. "
        "To add a family, write one file in adapters/ (see docs/guides/adding_a_family.md)."
    )


def plan_for(adapter: Adapter, spec: Spec) -> tuple[Stage, ...]:
    """The stages of a method on a model; with M-RoPE, methods that were not told otherwise keep positions.

    Raises:
        ValueError: see `Spec.plan`.
    """
    return spec.plan(adapter.depths, adapter.num_tokens, "keep" if adapter.mrope else None)


def apply(
    model: Any,
    method: Any,
    keep: int | float | str | None = None,
    average: int | float | None = None,
    outputs: str = "auto",
    **options: Any,
) -> Handle:
    """Prune the visual tokens of every prompt that `model` gets from now on, or change how they are attended to.

    Args:
        model: a supported Hugging Face vision-language model (see `list_models()`), used as before: `generate()`,
            `forward()`, training. What `torch.compile`, peft, DDP or FSDP wrapped around it is looked through.
        method: a name ("holov", "var"), a name with its options and budget ("holov@64", "var(p=0.4)"), a mapping, a
            list of stages and interventions (["vtc_cls@128", "var"]), a YAML path, or a `Pruner` or `Intervention`
            object.
        keep: visual tokens kept of each image or video after the method's last cut: an int counts tokens, a float in
            (0, 1] is the kept fraction of those it had, a text like "avg64" the same as `average=64`.
        average: in place of `keep`, visual tokens of an image averaged over all decoder layers (int), or their
            fraction (float); the method's cuts are solved for it.
        outputs: rows of logits and hidden states of a pruned prompt. "kept": the tokens that stayed, `[B, P, ...]`,
            their right ends where the caller's are. "full": `[B, S, ...]`, with the last kept token before it at each
            place that left. "auto" takes "full" where the caller may count otherwise than from the right end (labels,
            hidden states, several or chosen `logits_to_keep`, `use_cache=False`, training and evaluation after it,
            padding on the right), and "kept" elsewhere.
        options: options of the method.

    Returns:
        The handle; `handle.remove()` undoes everything.

    Raises:
        TypeError: an unsupported model class, an unknown option, or a keep that is no number.
        UnknownName: an unknown method (a KeyError).
        ValueError: a bad budget, a tower that lacks what the method needs, a layer that the decoder does not have, or a
            method is applied already.
    """
    if outputs not in OUTPUTS:
        raise ValueError(f"outputs must be one of {', '.join(map(repr, OUTPUTS))}, got {outputs!r}.")
    adapter = adapter_for(unwrap(model))
    present = _applied.get(adapter.entry)  # which several wrappers may share
    if present is not None:
        raise ValueError(f"{present} is at work on this model already; call its remove() first.")
    spec = parse_method(method, keep, average, **options)
    stages = plan_for(adapter, spec)
    if adapter.mrope and any(stage.pruner.positions == "compact" for stage in stages):
        raise ValueError(
            f"positions='compact' has no meaning for {type(model).__name__}: its positions are 3-D ids (M-RoPE), of "
            "which gaps are no counts of tokens. Leave positions alone, or pass positions='keep'."
        )
    ledger = Ledger()
    engine = Engine(adapter, stages, spec.interventions, outputs)
    check_decoder_reads(adapter, stages, tuple(engine.attending.layers))
    inside = any(stage.place in ("vision", "layer") for stage in stages)
    try:
        Guards(adapter, spec.label, inside, bool(engine.attending)).install(ledger)
        engine.install(ledger)
    except BaseException:
        ledger.undo()
        raise
    handle = Handle(model, engine, ledger, spec.label)
    _applied[adapter.entry] = repr(handle)

    def forget() -> None:
        _applied.pop(adapter.entry, None)

    ledger.add(forget)
    return handle


@contextmanager
def applied(
    model: Any,
    method: Any,
    keep: int | float | str | None = None,
    average: int | float | None = None,
    outputs: str = "auto",
    **options: Any,
) -> Iterator[Handle]:
    """`apply` for the length of a `with` block; the model is restored also after an exception."""
    handle = apply(model, method, keep, average, outputs, **options)
    try:
        yield handle
    finally:
        handle.remove()
