"""A loaded model with the method of a point at work: what is checked before, and the answers of one batch."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from tokenprune import cost
from tokenprune.api import Prepared, prepare
from tokenprune.evals.config.engines import engine_made_of
from tokenprune.evals.config.points import NONE, Point
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.evaluation.batching import read_batch
from tokenprune.evals.evaluation.fingerprint import code_fingerprint
from tokenprune.evals.evaluation.retry import retry_in_halves
from tokenprune.evals.io.digest import digest, file_digest
from tokenprune.evals.models.load import LoadedModel
from tokenprune.evals.tasks.task import Sample, Task
from tokenprune.handle import Handle
from tokenprune.interfaces.intervention import Intervention
from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.signals import VISION_SIGNALS, Signal, TowerInfo
from tokenprune.plan.parse import Spec


class Fingerprinted(Protocol):
    """A model of any engine."""

    fingerprint: str


def settings_digest(config: RunConfig, loaded: Fingerprinted, task: str) -> str:
    """Changes with whatever besides the point could change an answer or its score: weights, code, engine, dtype, seed,
    answer length, files of weights that methods of the run read, and the task.

    Args:
        task: its fingerprint, which the digest ends in; "" gives what the digests of all tasks begin with.
    """
    parts = [loaded.fingerprint, code_fingerprint(), config.dtype, config.seed, config.max_new_tokens]
    pruned = [point for point in config.points() if point.method != NONE]
    specs = [point.compile() for point in pruned]
    files = {file for spec in specs for entry in spec.entries for file in entry.pruner.files}
    files |= {file for spec in specs for one in spec.interventions for file in one.files}
    parts += [file_digest(file) for file in sorted(files)]
    parts += engine_made_of(config.engine, config.engine_options)
    return f"{digest(parts)}.{task}"


def method_of(point: Point, seed: int) -> Spec:
    """The method of a point; what draws gets the point's seed, or the run's, unless the options set one."""
    seed = seed if point.seed is None else point.seed
    spec = point.compile()
    if not seed or "seed" in dict(point.options):
        return spec
    entries = tuple(
        replace(entry, pruner=replace(entry.pruner, seed=seed)) if getattr(entry.pruner, "seed", seed) == 0 else entry
        for entry in spec.entries
    )
    return replace(spec, entries=entries)


def calibrate_interventions(loaded: LoadedModel, task: Task, point: Point, handle: Handle, seed: int) -> None:
    """Let interventions see the prompts that they have to see before they act, the first ones of the task; every later
    use of the point starts with what they learned."""
    learned = learned_interventions(loaded, task, handle)
    if learned is not None:
        spec = replace(method_of(point, seed), interventions=learned)
        loaded.prepared[_place(point, seed)] = prepare(loaded.model, spec, adapter=loaded.adapter)


def learned_interventions(loaded: LoadedModel, task: Task, handle: Handle) -> tuple[Intervention, ...] | None:
    """The interventions at work, once they have seen the prompts of the task that they have to see; None where they
    want none."""

    def show(samples: list[Sample]) -> list[None]:
        with torch.inference_mode():
            loaded.model(**loaded.inputs([s.question for s in samples], [s.image for s in samples]))
        return [None] * len(samples)

    seen, batch = 0, 8
    while any(one.wants_prompts for one in handle.interventions) and seen < task.size:
        stop = min(seen + batch, task.size)
        samples = read_batch(task, seen, stop).samples
        if samples:
            retry_in_halves(samples, show)
        seen = stop
    return tuple(one.settled() for one in handle.interventions) if seen else None


def _place(point: Point, seed: int) -> tuple[str, int | None, int, int]:
    return point.label, point.seed, seed, id(point.compile())  # which lives as long as the process


def prepared_method(loaded: LoadedModel, point: Point, seed: int) -> Prepared:
    """The method of a point, made ready for a model; the same object whenever it is asked for."""
    key = _place(point, seed)
    if key not in loaded.prepared:
        loaded.prepared[key] = prepare(loaded.model, method_of(point, seed), adapter=loaded.adapter)
    return loaded.prepared[key]


@contextlib.contextmanager
def pruned(loaded: LoadedModel, point: Point, seed: int, samples: list[Sample]) -> Iterator[Any]:
    """The model with the point's method at work on prompts of `samples`; yields the handle, None for unpruned."""
    if point.method == NONE:
        yield None
        return
    with prepared_method(loaded, point, seed).applied() as handle:
        give_boxes(handle, point, samples)
        yield handle


def give_boxes(handle: Handle, point: Point, samples: list[Sample]) -> None:
    """Tell the method where what suffices for an answer is, if it asks.

    Raises:
        ValueError: a sample does not say.
    """
    if not _wants_boxes(handle):
        return
    missing = [sample.sample_id for sample in samples if sample.boxes is None]
    if missing:
        raise ValueError(
            f"{point.method} needs the boxes that suffice for an answer; sample {missing[0]} has none. "
            "Use it on the pocket suite, or on a task with a `boxes` column."
        )
    handle.set_hints(boxes=[sample.boxes for sample in samples])


def _wants_boxes(handle: Handle) -> bool:
    return any("boxes" in stage.pruner.needed_hints for stage in handle.stages)


def check_points(loaded: LoadedModel, task: Task, points: list[Point], seed: int) -> None:
    """Apply and remove every method once, so that one that cannot work on this model or task fails before the work, and
    so does a task whose samples the processor does not take; and let what learns from prompts do so."""
    _ = loaded.adapter  # refuses what is no model of a known family
    # rows go round the families, so these are one of each
    for sample in read_batch(task, 0, min(max(1, len(task.families)), task.size)).samples:
        loaded.inputs([sample.question], [sample.image])
    for point in points:
        if point.method == NONE:
            continue
        with prepared_method(loaded, point, seed).applied() as handle:
            if _wants_boxes(handle) and not task.has_boxes:
                raise ValueError(f"{point.method} needs the boxes that suffice for an answer; {task.name} has none.")
            calibrate_interventions(loaded, task, point, handle, seed)


@dataclass
class _Recorder(Pruner):
    """Keeps everything, and asks for the signals of every method that is to share one run of the tower."""

    wanted: tuple[Signal, ...] = field(default=())

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        return self.wanted


class SharedTower:
    """Runs the vision tower once for a batch and hands its features to every method that cuts after it.

    Uses what `generate` offers for features computed ahead (`mm_encoder_outputs`). The answers are those of separate
    runs, bit for bit; only accuracy is measured this way, never time.
    """

    def __init__(self, loaded: LoadedModel, points: list[Point], seed: int) -> None:
        self._model = loaded.model
        self._adapter = loaded.adapter
        prepared = {point.key: prepared_method(loaded, point, seed) for point in points if point.method != NONE}
        self._stages = {key: method.stages for key, method in prepared.items()}
        self.possible = "mm_encoder_outputs" in inspect.signature(loaded.model.forward).parameters
        signals = [
            signal
            for point in points
            if point.key in prepared and self.covers(point)
            for signal in prepared[point.key].signals
            if signal.name in VISION_SIGNALS
        ]
        self._recorder: Prepared | None = None
        if self.possible:
            recorder = _Recorder(wanted=tuple(dict.fromkeys(signals)))
            self._recorder = prepare(loaded.model, recorder, 1.0, adapter=self._adapter)

    def covers(self, point: Point) -> bool:
        """Whether the point cuts behind the tower only."""
        return all(stage.place in ("input", "layer") for stage in self._stages.get(point.key, ()))

    def encode(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The same inputs with features in place of pixels."""
        encoded: dict[str, Any] = {}
        pixels = {kind: name for kind, name in self._adapter.pixels.items() if inputs.get(name) is not None}
        if self._recorder is None:
            raise ValueError("This release of transformers takes no features computed ahead, so no tower is shared.")
        with self._recorder.applied():
            for kind in pixels:
                encode: Callable[..., Any] = getattr(*self._adapter.features_call(kind))
                names = inspect.signature(encode).parameters
                given = {name: inputs[name] for name in names if name in inputs}
                encoded[kind] = encode(**given, return_dict=True)
        rest = {name: value for name, value in inputs.items() if name not in pixels.values()}
        return {**rest, "mm_encoder_outputs": encoded}


def answer_batch(
    loaded: LoadedModel, point: Point, samples: list[Sample], inputs: dict[str, Any], seed: int, max_new_tokens: int
) -> tuple[list[str], Sequence[float], list[list[list[int]]]]:
    """Greedy answers of one batch.

    Returns:
        The texts; visual tokens per sample, averaged over the decoder's layers; raster indices per sample and image
        that reached its end ([] for unpruned).
    """
    length = inputs["input_ids"].shape[1]
    with pruned(loaded, point, seed, samples) as handle, torch.inference_mode():
        output = loaded.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
        texts = loaded.decode(output[:, length:])
        if handle is None:
            return texts, visual_tokens(loaded, inputs), [[] for _ in samples]
        kept = [[indices.tolist() for indices in images] for images in handle.kept]
        tokens = [cost.equivalent_tokens(layers) for layers in handle.visual_by_layer]
    return texts, tokens, kept


def visual_tokens(loaded: LoadedModel, inputs: dict[str, Any]) -> list[int]:
    """Visual tokens of each prompt before pruning."""
    ids = inputs["input_ids"]
    placeholders = loaded.adapter.placeholder_ids.values()
    return sum((ids == number for number in placeholders), torch.zeros_like(ids)).sum(1).tolist()
