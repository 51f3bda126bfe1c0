"""FLOPs of one prompt by part: measured with torch's FlopCounterMode, counted from the sizes, and the two compared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import StoppingCriteria, StoppingCriteriaList

from tokenprune import cost
from tokenprune.api import prepare
from tokenprune.evals.config.points import NONE, Point
from tokenprune.evals.evaluation.applied_method import pruned
from tokenprune.evals.io.rows import FLOPS_PARTS as PARTS
from tokenprune.evals.io.rows import FlopsCosts
from tokenprune.evals.models.load import LoadedModel
from tokenprune.evals.tasks.task import Sample
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.bypass import Bypass
from tokenprune.kernels.dispatch import FORMULAS
from tokenprune.state.device_timer import DeviceTimer

TOLERANCE = 0.01
"""Largest relative difference between measured and analytic FLOPs that is not spoken of."""

_EVERYTHING = "keeps everything"  # under which its method is kept among those that are ready
_FUSED = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # by the query's heads: torch 2.11 counts no grouped queries
    key, value = ((part[0], query[1], *part[2:]) for part in (key, value))
    return sdpa_flop_count(query, key, value)


def _experts(rows: Any, weights: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # [S, in] x [E, in, out]: each row is multiplied with the matrix of its expert
    return 2 * rows[0] * weights[-2] * weights[-1]


class _NoModules:
    """In place of what follows a FlopCounterMode through modules: that hooks gradients, and fails where a parameter is
    handed to a module while there are none (the latents of a perceiver)."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def flop_counter() -> FlopCounterMode:
    """A FlopCounterMode that also counts our own ops, with triton or without, fused attention of grouped queries and on
    CPUs, and matrices of experts, which releases of torch refuse or leave at zero."""
    fused = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None) for name in _FUSED]
    mapping = {op: _attention for op in fused if op is not None}
    grouped = [getattr(torch.ops.aten, "_grouped_mm", None)]
    grouped.append(getattr(torch.ops.transformers, "grouped_mm_fallback", None))
    mapping |= {op: _experts for op in grouped if op is not None}
    counter = FlopCounterMode(display=False, custom_mapping={**FORMULAS, **mapping})
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


class _Tally:
    """What a counter counts while each module runs, and in methods and their signals, which belong to no module."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter = counter
        self.selection = 0
        self.spent: dict[str, int] = {}
        self.front = 0
        """What was counted when the decoder was first called."""
        self._begun: dict[str, int] = {}
        self._selecting = 0

    def _now(self) -> int:
        return self._counter.get_total_flops() - self.selection

    def _listen(self, begins: bool) -> None:
        if begins:
            self._selecting = self._counter.get_total_flops()
        else:
            self.selection += self._counter.get_total_flops() - self._selecting

    def _before(self, name: str, module: Any, args: Any, kwargs: Any) -> None:
        self._begun[name] = self._now()

    def _reached(self, module: Any, args: Any, kwargs: Any) -> None:
        self.front = self.front or self._now()

    def _after(self, name: str, module: Any, args: Any, output: Any) -> None:
        self.spent[name] = self.spent.get(name, 0) + self._now() - self._begun[name]

    @contextmanager
    def of(self, modules: dict[str, Any], decoder: Any) -> Iterator[None]:
        """Count in these modules, in selections, and before the decoder (or a part of it)."""
        hooks = [decoder.register_forward_pre_hook(self._reached, with_kwargs=True)]
        self.front = 0
        self.spent = dict.fromkeys(modules, 0)
        DeviceTimer.listener = self._listen
        try:
            for name, module in modules.items():
                if module is not None:
                    before = functools.partial(self._before, name)
                    hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
                    hooks.append(module.register_forward_hook(functools.partial(self._after, name)))
            yield
        finally:
            DeviceTimer.listener = None
            for hook in hooks:
                hook.remove()


class _FirstToken(StoppingCriteria):
    """Reads the counters when the first token is there; never stops."""

    def __init__(self, read: Callable[[], dict[str, float]]) -> None:
        self._read = read
        self.seen: dict[str, float] | None = None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self.seen is None:
            self.seen = self._read()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def count_once(adapter: Adapter, inputs: dict[str, Any]) -> dict[str, float]:
    """What FlopCounterMode counts in one prefill and one decode step through `generate`: by part, and of the prefill by
    decoder layer (`layer:K`) and in the head (`head`)."""
    counter = flop_counter()
    tally = _Tally(counter)
    vision, projector = adapter.vision.module, adapter.projector
    modules = {"vision": vision, "projector": projector, "head": adapter.head}
    modules |= {f"layer:{i}": layer for i, layer in enumerate(adapter.layers)}
    # a decoder that merges by itself runs the tower too, which is no part of its work
    decoder = adapter.layers[0] if adapter.entry is adapter.language_model else adapter.language_model
    with torch.inference_mode(), counter, tally.of(modules, decoder):
        first = _FirstToken(lambda: {**tally.spent, "selection": tally.selection, "total": counter.get_total_flops()})
        adapter.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=2,
            min_new_tokens=2,
            stopping_criteria=StoppingCriteriaList([first]),
        )
    parts = dict(first.seen or {})
    if projector is None:  # no module that is known: all that comes between tower and decoder
        parts["projector"] = tally.front - parts["vision"]
    elif any(module is projector for module in vision.modules()):
        parts["vision"] -= parts["projector"]
    total = parts.pop("total")
    parts["prefill"] = total - sum(parts[part] for part in ("vision", "projector", "selection"))
    parts["decode"] = counter.get_total_flops() - total
    return parts


def measure_flops(
    loaded: LoadedModel, point: Point, samples: list[Sample], seed: int = 0, counting: bool = True
) -> FlopsCosts:
    """Measured and analytic FLOPs of one prompt, averaged over `samples`.

    Args:
        counting: whether to run FlopCounterMode; without it only the analytic count is there and `measured` is None.

    Returns:
        `measured` and `analytic` (by part and `total`, which leaves `decode` out), `unpruned` (analytic),
        `difference` (relative, by part, and under `layers` the largest of a decoder layer at prefill), `agree` (all
        within `TOLERANCE`; None where a part is not modelled and the others are within it) and `paper` (see
        `tokenprune.cost`). Parts that are not modelled are None, and have no difference.
    """
    shape = loaded.adapter.cost_shape()
    measured, analytic, unpruned = (_nothing() for _ in range(3))
    by_layer: list[float] = []
    paper: float | None = 0.0
    for sample in samples:
        inputs = dict(loaded.inputs([sample.question], [sample.image]))
        # the handle that gives the unpruned model its report asks for scores, which would be counted
        parts = count_once(loaded.adapter, inputs) if counting and point.method == NONE else None
        with _watched(loaded, point, seed, sample) as handle:
            if counting and point.method != NONE:
                parts = count_once(loaded.adapter, inputs)
            else:
                with torch.inference_mode():
                    loaded.model(**inputs, logits_to_keep=1)
            report = handle.report()
        if parts is not None:
            _add(measured, parts, len(samples))
            layers = [(report.flops_by_layer[i], parts[f"layer:{i}"]) for i in range(shape.layers)]
            by_layer += [_relative(counted, layer) for counted, layer in layers if counted is not None]
        _add(unpruned, report.flops_unpruned.as_dict(), len(samples))
        _add(analytic, report.flops.as_dict(), len(samples))
        # the formula has no term for what tokens leave undone in a layer that they pass by
        passes_by = any(isinstance(one, Bypass) and one.mode != "mask" for one in handle.interventions)
        simple = None if passes_by else cost.paper_flops(shape, report.tokens_by_layer)
        paper = plus(paper, simple, len(samples))
    result: FlopsCosts = {
        "analytic": with_total(analytic), "unpruned": with_total(unpruned), "paper": paper, "measured": None,
        "difference": None, "agree": None,
    }  # fmt: skip
    if not counting:
        return result
    both = {part: (analytic[part], measured[part]) for part in PARTS}
    difference = {part: _relative(a, m) for part, (a, m) in both.items() if a is not None and m is not None}
    if by_layer:
        difference["layers"] = max(by_layer, key=abs)
    agree: bool | None = all(abs(value) <= TOLERANCE for value in difference.values())
    if agree and any(analytic[part] is None for part in PARTS):
        agree = None  # of a part without a number nobody can say that it agrees
    return {
        **result,
        "measured": cast("dict[str, float]", with_total(measured)),
        "difference": difference,
        "agree": agree,
    }


def disagreements(of: str, measured: Mapping[str, FlopsCosts]) -> list[str]:
    """One sentence on all points whose analytic and measured FLOPs differ by more than `TOLERANCE`, those that differ
    alike together; nothing where there is none.

    Args:
        of: which model on which task it is.
        measured: by the label of the point.
    """
    alike: dict[str, list[str]] = {}
    differences = {label: flops["difference"] for label, flops in measured.items() if flops["difference"] is not None}
    for label, difference in differences.items():
        off = {part: value for part, value in difference.items() if abs(value) > TOLERANCE}
        if off:
            alike.setdefault(", ".join(f"{part} {value:+.1%}" for part, value in off.items()), []).append(label)
    if not alike:
        return []
    said = "; ".join(f"{off} at {', '.join(labels)}" for off, labels in alike.items())
    where = f"{sum(map(len, alike.values()))} of {len(differences)} points"
    return [f"Analytic FLOPs of {of} differ from measured ones by more than {TOLERANCE:.0%} at {where}: {said}."]


@contextmanager
def _watched(loaded: LoadedModel, point: Point, seed: int, sample: Sample) -> Iterator[Any]:
    """The model at the point; for the unpruned one, with a method that keeps everything, for its report."""
    if point.method == NONE:
        if _EVERYTHING not in loaded.prepared:
            loaded.prepared[_EVERYTHING] = prepare(loaded.model, "random", 1.0, adapter=loaded.adapter)
        with loaded.prepared[_EVERYTHING].applied() as handle:
            yield handle
        return
    with pruned(loaded, point, seed, [sample]) as handle:
        yield handle


def _nothing() -> dict[str, float | None]:
    return dict.fromkeys(PARTS, 0.0)


def _add(total: dict[str, float | None], counted: Mapping[str, float | None], over: int) -> None:
    for part in PARTS:
        total[part] = plus(total[part], counted[part], over)


def plus(total: float | None, counted: float | None, over: int) -> float | None:
    """A mean so far and one more of `over` values; None as soon as one of them is not modelled."""
    return None if total is None or counted is None else total + counted / over


def with_total(parts: dict[str, float | None]) -> dict[str, float | None]:
    """FLOPs by part with their sum up to the first token; None where a part is not modelled."""
    summed = [value for part, value in parts.items() if part != "decode"]
    return {**parts, "total": None if None in summed else sum(value for value in summed if value is not None)}


def _relative(counted: float, measured: float) -> float:
    if measured == 0:
        return 0.0 if counted == 0 else 1.0
    return counted / measured - 1


def cache_bytes(cache: Any) -> list[int]:
    """Bytes that each layer of a KV cache really holds: keys and values, keys of an indexer, states of linear
    attention."""
    sizes = []
    for layer in cache.layers:
        held = [getattr(layer, name, None) for name in ("keys", "values", "indexer_keys")]
        for name in ("conv_states", "recurrent_states"):  # by state, in one layer or several
            states = getattr(layer, name, None)
            held += states.values() if isinstance(states, dict) else states if isinstance(states, list) else [states]
        sizes.append(sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor)))
    return sizes


def keys_held(cache: Any) -> list[int | None]:
    """Keys of each layer of a KV cache; None where it has none, or has dropped some that no later query sees."""
    held: list[int | None] = []
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        if not isinstance(keys, torch.Tensor) or keys.dim() <= 2:
            held.append(None)
            continue
        dropped = getattr(layer, "cumulative_length", keys.shape[-2]) > keys.shape[-2]
        held.append(None if dropped else keys.shape[-2])
    return held
