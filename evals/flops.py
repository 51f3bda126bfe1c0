"""FLOPs of one prompt by part: measured with torch's FlopCounterMode, counted from the sizes, and the two compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import StoppingCriteria, StoppingCriteriaList

from tokenprune import cost
from tokenprune.api import adapter_for
from tokenprune.evals.config import Point
from tokenprune.evals.models import LoadedModel
from tokenprune.evals.runner import pruned, visual_tokens
from tokenprune.evals.tasks import Sample

PARTS: tuple[str, ...] = ("vision", "projector", "selection", "prefill", "decode")
TOLERANCE = 0.01
"""Largest relative difference between measured and analytic FLOPs that raises no warning."""

_TOWERS = ("vision_tower", "visual", "vision_model")
_PROJECTORS = ("multi_modal_projector", "projector", "connector", "merger")


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def flop_counter() -> FlopCounterMode:
    """A FlopCounterMode that also counts the fused attention of CPUs, which torch 2.13 leaves at zero."""
    fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    mapping = {} if fused is None else {fused: _cpu_attention}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _submodule(entry: Any, names: tuple[str, ...]) -> nn.Module | None:
    return next((getattr(entry, name) for name in names if isinstance(getattr(entry, name, None), nn.Module)), None)


@contextmanager
def _by_module(modules: dict[str, nn.Module | None], counter: FlopCounterMode) -> Iterator[dict[str, int]]:
    """Adds up what `counter` counts while each module runs."""
    spent = dict.fromkeys(modules, 0)
    begun: dict[str, int] = {}
    hooks = []

    def before(name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            begun[name] = counter.get_total_flops()

        return hook

    def after(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            spent[name] += counter.get_total_flops() - begun[name]

        return hook

    try:
        for name, module in modules.items():
            if module is not None:
                hooks.append(module.register_forward_pre_hook(before(name)))
                hooks.append(module.register_forward_hook(after(name)))
        yield spent
    finally:
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


def _measure_once(loaded: LoadedModel, inputs: dict[str, Any], handle: Any) -> dict[str, float]:
    """One prefill and one decode step, through `generate`."""
    counter = flop_counter()
    selection = 0
    method: Any = handle.method if handle is not None else None

    def counted_select(view: Any) -> Any:
        nonlocal selection
        begun = counter.get_total_flops()
        result = type(method).select(method, view)
        selection += counter.get_total_flops() - begun
        return result

    entry = adapter_for(loaded.model).entry
    modules = {"vision": _submodule(entry, _TOWERS), "projector": _submodule(entry, _PROJECTORS)}
    if method is not None:
        method.select = counted_select
    try:
        with torch.inference_mode(), counter, _by_module(modules, counter) as spent:
            first = _FirstToken(lambda: {**spent, "selection": selection, "total": counter.get_total_flops()})
            loaded.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=2,
                min_new_tokens=2,
                stopping_criteria=StoppingCriteriaList([first]),
            )
    finally:
        if method is not None:
            del method.select
    found = dict(first.seen or {})
    total = found.pop("total")
    found["prefill"] = total - sum(found.values())
    found["decode"] = counter.get_total_flops() - total
    return found


def measure_flops(
    loaded: LoadedModel,
    point: Point,
    samples: list[Sample],
    seed: int = 0,
    counting: bool = True,
    plain_counts: dict[str, dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Measured and analytic FLOPs of one prompt, averaged over `samples`.

    Args:
        counting: whether to run FlopCounterMode; without it only the analytic count is there and `measured` is None.
        plain_counts: what the unpruned model was measured at, by sample id; read and filled in.

    Returns:
        `measured` and `analytic` (by part and `total`, which leaves `decode` out), `unpruned` (analytic),
        `difference` (relative, by part), `agree` (all within `TOLERANCE`) and `paper` (see `tokenprune.cost`).
    """
    shape = adapter_for(loaded.model).cost_shape()
    plain_counts = {} if plain_counts is None else plain_counts
    measured, analytic, unpruned = (dict.fromkeys(PARTS, 0.0) for _ in range(3))
    paper = 0.0
    for sample in samples:
        inputs = dict(loaded.inputs([sample.question], [sample.image]))
        length, visual = inputs["input_ids"].shape[1], visual_tokens(loaded, inputs)[0]
        plain = plain_counts.get(sample.sample_id)
        if plain is None and counting:
            plain = plain_counts[sample.sample_id] = _measure_once(loaded, inputs, None)
        counted = cost.prompt_flops(shape, [length] * shape.layers).as_dict()
        _add(unpruned, counted, len(samples))
        with pruned(loaded, point, seed, [sample]) as handle:
            found, lengths = plain, [length] * shape.layers
            if handle is not None:
                if plain is not None:
                    found = _measure_once(loaded, inputs, handle)
                    if handle.method.site == "input":
                        # signals are recorded while the tower runs; what they cost is what the tower costs more
                        found["selection"] += found["vision"] - plain["vision"]
                        found["vision"] = plain["vision"]
                else:
                    with torch.inference_mode():
                        loaded.model(**inputs, logits_to_keep=1)
                report = handle.report()
                counted = report.flops.as_dict()
                lengths = [length - visual + report.kept_tokens] * shape.layers
        if found is not None:
            _add(measured, found, len(samples))
        _add(analytic, counted, len(samples))
        paper += cost.paper_flops(shape, lengths) / len(samples)
    result = {"analytic": _with_total(analytic), "unpruned": _with_total(unpruned), "paper": paper}
    if not counting:
        return {**result, "measured": None, "difference": None, "agree": None}
    difference = {part: _relative(analytic[part], measured[part]) for part in PARTS}
    agree = all(abs(value) <= TOLERANCE for value in difference.values())
    if not agree:
        off = ", ".join(f"{part} {value:+.1%}" for part, value in difference.items() if abs(value) > TOLERANCE)
        text = f"Analytic and measured FLOPs of {point.label} differ by more than 1 percent: {off}."
        warnings.warn(text, stacklevel=2)
    return {**result, "measured": _with_total(measured), "difference": difference, "agree": agree}


def _add(total: dict[str, float], counted: Mapping[str, float], over: int) -> None:
    for part in PARTS:
        total[part] += counted[part] / over


def _with_total(parts: dict[str, float]) -> dict[str, float]:
    return {**parts, "total": sum(value for part, value in parts.items() if part != "decode")}


def _relative(counted: float, measured: float) -> float:
    if measured == 0:
        return 0.0 if counted == 0 else 1.0
    return counted / measured - 1


def cache_bytes(cache: Any) -> list[int]:
    """Bytes of keys and values that each layer of a KV cache really holds."""
    sizes = []
    for layer in cache.layers:
        tensors = [getattr(layer, name, None) for name in ("keys", "values")]
        sizes.append(sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)))
    return sizes
