"""The calls of the library: `apply` and `applied`, and `prepare` for whoever changes between methods."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenprune.engine.decoder_probe import check_removal, to_be_tried
from tokenprune.engine.engine import Engine
from tokenprune.engine.guards import Guards
from tokenprune.engine.layer_check import check_decoder_reads, check_places
from tokenprune.engine.outputs import OUTPUTS
from tokenprune.handle import Handle
from tokenprune.hooks import Ledger
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.pruner import Stage
from tokenprune.interfaces.signals import Signal
from tokenprune.plan.parse import Spec, parse_method
from tokenprune.registry import MODELS
from tokenprune.seams import check_seams
from tokenprune.wrappers import Links, unwrap

# text, not handles: a handle refers to its model, which would then never be freed
_applied: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def adapter_for(model: Any) -> Adapter:
    """The adapter that covers `model`'s class.

    Raises:
        TypeError: no adapter does; the message lists what is supported.
        ImportError: the installed torch or transformers lacks what the library needs of it.
    """
    names = [cls.__name__ for cls in type(model).__mro__]
    families = MODELS.loaded()
    for family in families.values():
        if any(name in family.classes for name in names) and family.covers(model):
            check_seams(model)
            return family(model)
    check_seams(model)
    try:
        return families["generic"](model)
    except TypeError as error:
        supported = sorted(name for family in families.values() for name in family.classes)
        raise TypeError(
            f"No adapter covers a {names[0]}. {error} Classes with a family file: {', '.join(supported)}. To add a "
            "family, write one file in adapters/ (see docs/guides/adding_a_family.md)."
        ) from error


def plan_for(adapter: Adapter, spec: Spec) -> tuple[Stage, ...]:
    """The stages of a method on a model; with M-RoPE, methods that were not told otherwise keep positions.

    Raises:
        ValueError: see `Spec.plan`.
    """
    return spec.plan(adapter.depths, adapter.num_tokens, "keep" if adapter.mrope else None)


class Prepared:
    """A method that is made ready for a model: checked and planned once, put to work as often as one likes.

    For whoever changes between methods on one model; `prepare` makes it.

    Args:
        model: what the caller holds, wrappers and all.
        adapter: of the model inside.
        spec: the method, read.
        stages: its cuts on this model.
        outputs, verify: see `apply`.

    Raises:
        ValueError: the decoder cannot be cut as the method would cut it, or a layer is not what the method takes it
            for.
    """

    def __init__(
        self,
        model: Any,
        adapter: Adapter,
        spec: Spec,
        stages: tuple[Stage, ...],
        outputs: str = "auto",
        verify: bool = True,
    ) -> None:
        self.model, self.adapter, self.stages, self.label = model, adapter, stages, spec.label
        self._engine = Engine(adapter, stages, spec.interventions, outputs, verify)
        check_places(adapter, stages)
        if verify:
            check_decoder_reads(adapter, stages, self._engine.changed_layers)
            if stages and to_be_tried(adapter):
                check_removal(adapter, stages)
        inside = any(stage.place == "layer" or stage.after_block is not None for stage in stages)
        self._guards = Guards(adapter, spec.label, inside, bool(self._engine.attending))
        vision = adapter.vision
        self._links = Links(adapter.model, [*adapter.layers, *vision.blocks, *vision.exits])

    @property
    def signals(self) -> tuple[Signal, ...]:
        """What the method and its interventions read of tower and decoder."""
        return self._engine.signals

    def apply(self) -> Handle:
        """Put the method to work.

        Raises:
            ValueError: a method is at work on the model already.
            RuntimeError: modules of the model were replaced since; prepare again.
        """
        check_free(self.adapter)
        self._links.check()
        ledger = Ledger()
        try:
            self._guards.install(ledger)
            self._engine.install(ledger)
        except BaseException:
            ledger.undo()
            raise
        handle = Handle(self.model, self._engine, ledger, self.label)
        taken = (self.adapter.entry, self.adapter.language_model)
        _applied.update(dict.fromkeys(taken, repr(handle)))

        def forget() -> None:
            for module in taken:
                _applied.pop(module, None)

        ledger.add(forget)
        return handle

    @contextmanager
    def applied(self) -> Iterator[Handle]:
        """`apply` for the length of a `with` block."""
        with self.apply() as handle:
            yield handle


def check_free(adapter: Adapter) -> None:
    """Raise ValueError if a method is at work on a model, which several wrappers may share, or on a decoder that
    several models share: each would take back what it changed there, in an order that it does not know."""
    present = _applied.get(adapter.entry)
    if present is not None:
        raise ValueError(f"{present} is at work on this model already; call its remove() first.")
    present = _applied.get(adapter.language_model)
    if present is not None:
        raise ValueError(
            f"{present} is at work on another model that shares this one's decoder "
            f"({type(adapter.language_model).__name__}); call its remove() first, or give each model its own decoder."
        )


def apply(
    model: Any,
    method: Any,
    keep: int | float | str | None = None,
    average: int | float | None = None,
    outputs: str = "auto",
    verify: bool = True,
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
        verify: whether the loaded decoder is tried first: layers that the method reads, and where its class has no
            tests of its own, whether taking tokens out of it is hiding them. It takes passes of a few tokens. A tower
            without tests is tried at its first picture; the order of its patches is found out in any case.
        options: options of the method.

    Returns:
        The handle; `handle.remove()` undoes everything.

    Raises:
        TypeError: an unsupported model class, an unknown option, or a keep that is no number.
        UnknownName: an unknown method (a KeyError).
        ValueError: a bad budget, a tower that lacks what the method needs, a layer that the decoder does not have, or a
            method is applied already.
    """
    adapter = _checked_adapter(model, outputs)
    check_free(adapter)
    return prepare(model, method, keep, average, outputs, adapter, verify, **options).apply()


def prepare(
    model: Any,
    method: Any,
    keep: int | float | str | None = None,
    average: int | float | None = None,
    outputs: str = "auto",
    adapter: Adapter | None = None,
    verify: bool = True,
    **options: Any,
) -> Prepared:
    """Make a method ready for a model and leave the model as it is; takes and raises what `apply` does.

    Args:
        adapter: of the model, where `adapter_for` made one already.
    """
    adapter = _checked_adapter(model, outputs, adapter)
    spec = parse_method(method, keep, average, **options)
    stages = plan_for(adapter, spec)
    if adapter.mrope and any(stage.pruner.positions == "compact" for stage in stages):
        raise ValueError(
            f"positions='compact' has no meaning for {type(model).__name__}: its positions are 3-D ids (M-RoPE), of "
            "which gaps are no counts of tokens. Leave positions alone, or pass positions='keep'."
        )
    return Prepared(model, adapter, spec, stages, outputs, verify)


def _checked_adapter(model: Any, outputs: str, adapter: Adapter | None = None) -> Adapter:
    if outputs not in OUTPUTS:
        raise ValueError(f"outputs must be one of {', '.join(map(repr, OUTPUTS))}, got {outputs!r}.")
    return adapter_for(unwrap(model)) if adapter is None else adapter


@contextmanager
def applied(
    model: Any,
    method: Any,
    keep: int | float | str | None = None,
    average: int | float | None = None,
    outputs: str = "auto",
    verify: bool = True,
    **options: Any,
) -> Iterator[Handle]:
    """`apply` for the length of a `with` block; the model is restored also after an exception."""
    with apply(model, method, keep, average, outputs, verify, **options) as handle:
        yield handle
