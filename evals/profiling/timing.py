"""Times of one prompt: prefill, selection and decode, against the unpruned model and against the ideal prefill.

The ideal is the honest bound: the same model, its vision tower and projector on the same image, then the decoder on a
prompt that holds just the tokens kept at its input, and from each layer before which something left on just those that
were left there, so that its layers see the counts of the pruned run. No selection, no bookkeeping. A method that cuts
after the projector cannot be faster. (One that shrinks the picture or cuts inside the tower can: its tower has less to
do.)

Machines are noisy, so unpruned, pruned and ideal take turns within one round, and ratios are taken within a round.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from tokenprune import cost
from tokenprune.engine.prompt_reader import placeholders_in
from tokenprune.evals.config.measure import Measure
from tokenprune.evals.config.points import Point
from tokenprune.evals.evaluation.applied_method import pruned, visual_tokens
from tokenprune.evals.io.rows import KvCosts, Quartiles, TimedCosts
from tokenprune.evals.models.load import LoadedModel
from tokenprune.evals.profiling.flops import cache_bytes, keys_held, plus
from tokenprune.evals.statistics.bootstrap import median_iqr
from tokenprune.evals.tasks.task import Sample
from tokenprune.seams import cache_in, with_cache

Stays = torch.Tensor | dict[int, torch.Tensor]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the device is done, and what `work` returned."""
    _wait(device)
    begin = time.perf_counter()
    result = work()
    _wait(device)
    return time.perf_counter() - begin, result


def prefill(loaded: LoadedModel, inputs: dict[str, Any], **more: Any) -> Any:
    """One forward pass over a prompt: tower, projector, decoder, logits of the last position, KV cache."""
    return loaded.model(**inputs, use_cache=True, logits_to_keep=1, **more)


def ideal_prefill(loaded: LoadedModel, inputs: dict[str, Any], stays: Stays) -> Callable[[], Any]:
    """The work of an ideal pruned prefill, ready to be timed.

    Args:
        stays: by decoder layer before which something left, places of the prompts that stay, `[B, S]` bool, equally
            many in each (see `Handle.stays_by_layer`); one tensor where all of it left before the decoder.

    Raises:
        ValueError: the prompts keep different numbers of places.
    """
    model, adapter = loaded.model, loaded.adapter
    ids = inputs["input_ids"]
    kinds = [kind for kind, name in adapter.pixels.items() if inputs.get(name) is not None]  # pictures, videos or both
    visual = placeholders_in(adapter, ids, inputs)
    left = {layer: part.to(ids.device) for layer, part in (stays if isinstance(stays, dict) else {0: stays}).items()}
    for part in left.values():
        counts = part.sum(1).tolist()
        if len(set(counts)) > 1:
            raise ValueError(f"The ideal is timed for prompts that keep equally many tokens, got {counts}.")
    keep = left.pop(0)
    short_ids = ids[keep].view(len(ids), -1)
    parts = []
    for kind in kinds:
        encode: Callable[..., Any] = getattr(*adapter.features_call(kind))
        names = inspect.signature(encode).parameters
        given = {name: value for name, value in inputs.items() if name in names}
        places, rows = visual[kind][keep].view(short_ids.shape), keep[visual[kind]]
        parts.append((functools.partial(encode, **given, return_dict=True), places, rows))
    mask = torch.ones_like(short_ids)
    shorter = ShorterLayers(adapter.layers, keep, left)

    def short_rows() -> torch.Tensor:
        if adapter.entry is adapter.language_model:  # it merges by itself
            return adapter.merged(inputs)[keep].view(*short_ids.shape, -1)
        embeds = model.get_input_embeddings()(short_ids)
        for encoded, places, rows in parts:
            features = torch.cat(list(encoded().pooler_output))
            # LLaVA-1.5 stacks equal pictures, the others list them
            features = features.flatten(0, -2)
            embeds = embeds.masked_scatter(places[..., None], features[rows].to(embeds.dtype))
        return embeds

    def run() -> Any:
        embeds = short_rows()
        with shorter.at_work():
            return model(inputs_embeds=embeds, attention_mask=mask, use_cache=True, logits_to_keep=1)

    return run


class ShorterLayers:
    """Decoder layers that see fewer tokens than those before them, by indices that are known beforehand.

    Args:
        layers: of the decoder.
        given: `[B, S]` bool, places that the decoder is given.
        left: by layer, `[B, S]` bool, places that are left from there on.
    """

    def __init__(self, layers: Sequence[Any], given: torch.Tensor, left: Mapping[int, torch.Tensor]) -> None:
        self._layers = layers
        self._index: dict[int, torch.Tensor] = {}  # by layer, among the places that the decoder was given
        self._among: dict[int, torch.Tensor] = {}  # the same, among those that were left before
        before, current = given, None
        for layer in range(len(layers)):
            if layer in left:
                now = left[layer] & before
                self._among[layer] = _numbers(now[before].view(len(now), -1))
                current, before = _numbers(now[given].view(len(now), -1)), now
            if current is not None:
                self._index[layer] = current

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Hooks on the layers, for as long as this lasts."""
        hooks = [
            self._layers[layer].register_forward_pre_hook(functools.partial(self._enter, layer), with_kwargs=True)
            for layer in self._index
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, layer: int, module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        index = self._index[layer]
        hidden, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        if layer in self._among:
            hidden = _take(hidden, self._among[layer], 1)
        changed = dict(kwargs)
        if changed.get("position_embeddings") is not None:
            changed["position_embeddings"] = tuple(_take(part, index, -2) for part in changed["position_embeddings"])
        for name in ("position_ids", "cache_position"):
            if isinstance(changed.get(name), torch.Tensor):
                changed[name] = _take(changed[name], index, -1)
        mask = changed.get("attention_mask")
        if isinstance(mask, torch.Tensor):
            changed["attention_mask"] = _take(_take(mask, index, -1), index, -2) if mask.dim() == 4 else None
        if args:
            return (hidden, *rest), changed
        return (), {**changed, "hidden_states": hidden}


def _numbers(stays: torch.Tensor) -> torch.Tensor:
    """`[B, k]` int64: where each row of `[B, n]` is True."""
    return stays.nonzero()[:, 1].view(len(stays), -1)


def _take(values: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """`values` at `index` `[B, k]` along a dimension; its first one is B, or 1 for all rows alike, or there is none but
    the last ones."""
    dim %= values.dim()
    if dim == 0:  # one row for all
        return values[index[0]]
    first = 1 if values.dim() >= 3 and values.shape[0] == 3 and dim == values.dim() - 1 == 2 else 0  # M-RoPE: [3, B, S]
    shape = [1] * values.dim()
    shape[first], shape[dim] = index.shape
    target = list(values.shape)
    target[first], target[dim] = index.shape
    if values.shape[first] == 1:
        values = values.expand(*(index.shape[0] if d == first else -1 for d in range(values.dim())))
    return values.gather(dim, index.view(shape).expand(target))


class Stamps(StoppingCriteria):
    """Notes the time after each generated token; never stops."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        _wait(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def decode_seconds(loaded: LoadedModel, inputs: dict[str, Any], tokens: int) -> list[float]:
    """Seconds of each decode step after the first token of one `generate`."""
    stamps = Stamps(loaded.model.device)
    loaded.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=tokens + 1,
        min_new_tokens=tokens + 1,
        stopping_criteria=StoppingCriteriaList([stamps]),
    )
    return [after - before for before, after in zip(stamps.times, stamps.times[1:])]


def measure_times(
    loaded: LoadedModel, point: Point, samples: list[Sample], measure: Measure, seed: int = 0
) -> TimedCosts:
    """Times, in seconds, and KV bytes, on `samples` one by one.

    Returns:
        `kv`: `measured` (bytes that the real cache holds after the prompt, mean over samples), `analytic`, `unpruned`
        (analytic), `per_layer` (measured, of the first sample), `lengths` (keys per layer, of the first sample; None
        where a layer has none or has dropped some), `equivalent_tokens` (visual keys averaged over the other layers and
        samples, read off the real cache).
        `times`: median and quartiles of `prefill`, `unpruned_prefill`, `ideal_prefill`, `selection`, `decode` (per
        token), and of the ratios `to_ideal`, `to_unpruned` and `selection_share`, each taken within
        a round. The unpruned model has no ideal and no selection.
    """
    shape = loaded.adapter.cost_shape()
    itemsize = loaded.model.dtype.itemsize
    logs: dict[str, list[float]] = {}
    kv: KvCosts = {
        "measured": 0.0, "analytic": 0.0, "unpruned": 0.0, "equivalent_tokens": 0.0, "per_layer": [], "lengths": [],
    }  # fmt: skip

    for number, sample in enumerate(samples):
        inputs = dict(loaded.inputs([sample.question], [sample.image]))
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            with pruned(loaded, point, seed, [sample]) as handle:
                run = functools.partial(prefill, loaded, inputs)
                cache = cache_in(with_cache(run, loaded.adapter.language_model.config))
                stays = None if handle is None else handle.stays_by_layer
                counted = cost.kv_bytes(shape, [length] * shape.layers, itemsize)
                report = None if handle is None else handle.report()
                pruned_bytes = counted if report is None else report.kv_bytes
                kv["unpruned"] = plus(kv["unpruned"], counted, len(samples))
                kv["analytic"] = plus(kv["analytic"], pruned_bytes, len(samples))
            sizes = cache_bytes(cache)
            kv["measured"] += sum(sizes) / len(samples)
            lengths = keys_held(cache)
            text = length - visual_tokens(loaded, inputs)[0]
            whole = [n - text for n in lengths if n is not None]
            if not whole:  # every layer has dropped keys: what it was given
                whole = [length - text if report is None else report.equivalent_tokens]
            kv["equivalent_tokens"] += cost.equivalent_tokens(whole) / len(samples)
            if number == 0:
                kv["per_layer"], kv["lengths"] = [*sizes], [*lengths]
            del cache
            if not measure.times:
                continue
            ideal = None if stays is None else ideal_prefill(loaded, inputs, stays)
            for turn in range(measure.warmup + measure.repeats):
                seconds = _round(loaded, point, sample, seed, inputs, ideal, turn)
                if turn >= measure.warmup:
                    for name, value in seconds.items():
                        logs.setdefault(name, []).append(value)
            if measure.decode_tokens:
                with pruned(loaded, point, seed, [sample]):
                    logs.setdefault("decode", []).extend(decode_seconds(loaded, inputs, measure.decode_tokens))
    times = {name: cast(Quartiles, median_iqr(values)) for name, values in logs.items()}
    return {"kv": kv, "times": times}


def _round(
    loaded: LoadedModel,
    point: Point,
    sample: Sample,
    seed: int,
    inputs: dict[str, Any],
    ideal: Callable[[], Any] | None,
    turn: int,
) -> dict[str, float]:
    """Unpruned, pruned and ideal prefill once each, in an order that rotates with `turn`."""
    device = loaded.model.device
    seconds: dict[str, float] = {}

    def unpruned_turn() -> None:
        seconds["unpruned_prefill"] = timed(device, lambda: prefill(loaded, inputs))[0]

    def pruned_turn() -> None:
        with pruned(loaded, point, seed, [sample]) as handle:
            seconds["prefill"] = timed(device, lambda: prefill(loaded, inputs))[0]
            seconds["selection"] = handle.report().selection_seconds

    def ideal_turn() -> None:
        if ideal is not None:
            seconds["ideal_prefill"] = timed(device, ideal)[0]

    if ideal is None:
        unpruned_turn()
        return {"prefill": seconds["unpruned_prefill"], **seconds}
    turns = [unpruned_turn, pruned_turn, ideal_turn]
    for i in range(len(turns)):
        turns[(i + turn) % len(turns)]()
    seconds["to_ideal"] = seconds["prefill"] / seconds["ideal_prefill"]
    seconds["to_unpruned"] = seconds["prefill"] / seconds["unpruned_prefill"]
    seconds["selection_share"] = seconds["selection"] / seconds["unpruned_prefill"]
    return seconds
