"""One prompt answered at one method, with what it cost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteriaList

from tokenprune.api import Prepared, prepare
from tokenprune.evals.config.points import NONE, Point
from tokenprune.evals.evaluation.applied_method import give_boxes, learned_interventions, visual_tokens
from tokenprune.evals.models.load import LoadedModel
from tokenprune.evals.profiling.timing import Stamps, timed
from tokenprune.evals.tasks.task import Sample, Task
from tokenprune.handle import Handle
from tokenprune.plan.parse import Spec

EVERYTHING = "one prompt, all of it kept"
"""Where a method that keeps everything lies among the prepared ones: it counts what the unpruned model costs."""


@dataclass(frozen=True)
class Outcome:
    """What came of one prompt.

    Attributes:
        label: the method with its budget; "none" for the unpruned model.
        answer: its text.
        visual: visual tokens that the processor laid out.
        kept: of these, in the decoder's last layer.
        average: of these, averaged over the decoder's layers.
        flops: to the first token (2 per multiply-add, matrix products only); None where they are not modelled.
        kv_bytes: of the prompt's KV cache; None where they are not modelled.
        first_token: seconds until the first token was there; one run, no mean.
        seconds: until the whole answer was.
        places: kept indices of each visual, in its raster order; [] for the unpruned model.
        shrinks: whether the method shows the tower fewer pixels instead of dropping tokens.
        notes: what a reader must know, and what interventions did.
    """

    label: str
    answer: str
    visual: int
    kept: int
    average: float
    flops: int | None
    kv_bytes: int | None
    first_token: float
    seconds: float
    places: list[list[int]]
    shrinks: bool = False
    notes: tuple[str, ...] = ()


def make_ready(loaded: LoadedModel, spec: Spec, task: Task) -> Prepared:
    """A method made ready for a model. Interventions that have to see prompts before they act see those of `task`."""
    prepared = prepare(loaded.model, spec, adapter=loaded.adapter)
    with prepared.applied() as handle:
        learned_interventions(loaded, task, handle)  # these objects themselves, so that reports say what they found
    return prepared


def ask(
    loaded: LoadedModel, prepared: Prepared | None, sample: Sample, inputs: dict[str, Any], max_new_tokens: int
) -> Outcome:
    """The greedy answer to one prompt. One thread at a time: the method is at work on the model meanwhile.

    Args:
        prepared: the method (`make_ready`); None for the unpruned model.
        inputs: the processor's, of `sample`.

    Raises:
        ValueError: the method cannot prune this prompt, or wants boxes that the sample does not have.
    """
    before = visual_tokens(loaded, inputs)[0]
    if prepared is None:
        flops, kv_bytes = _unpruned_costs(loaded, inputs)
        answer, first, seconds = _generate(loaded, inputs, max_new_tokens)
        return Outcome(NONE, answer, before, before, float(before), flops, kv_bytes, first, seconds, [])
    with _at_work(prepared, loaded, sample) as handle:
        answer, first, seconds = _generate(loaded, inputs, max_new_tokens)
        report, places = handle.report(), handle.kept[0]
    return Outcome(
        prepared.label, answer, before, report.kept_tokens, report.equivalent_tokens, report.flops.total,
        report.kv_bytes, first, seconds, [place.tolist() for place in places],
        any(stage.pruner.site == "pixels" and not stage.pruner.cuts_pixels for stage in prepared.stages),
        (*report.interventions, *report.notes),
    )  # fmt: skip


@contextlib.contextmanager
def _at_work(prepared: Prepared, loaded: LoadedModel, sample: Sample) -> Iterator[Handle]:
    with prepared.applied() as handle:
        give_boxes(handle, Point(loaded.name, "", prepared.label, None), [sample])
        yield handle


def _unpruned_costs(loaded: LoadedModel, inputs: dict[str, Any]) -> tuple[int | None, int | None]:
    """FLOPs and KV bytes of the whole prompt. The run that counts them also warms up the model, with what
    `generate` imports, so that the first answer's time is not that of a cold start."""
    if EVERYTHING not in loaded.prepared:
        loaded.prepared[EVERYTHING] = prepare(loaded.model, "random", 1.0, adapter=loaded.adapter)
    with loaded.prepared[EVERYTHING].applied() as handle, torch.inference_mode():
        _generate(loaded, inputs, 1)
        report = handle.report()
    return report.flops_unpruned.total, report.kv_bytes_unpruned


def _generate(loaded: LoadedModel, inputs: dict[str, Any], max_new_tokens: int) -> tuple[str, float, float]:
    """The answer, seconds to its first token, seconds to its end."""
    stamps = Stamps(loaded.model.device)

    def run() -> Any:
        return loaded.model.generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens,
            stopping_criteria=StoppingCriteriaList([stamps]),
        )  # fmt: skip

    with torch.inference_mode():
        begin = time.perf_counter()
        seconds, output = timed(loaded.model.device, run)
    (answer,) = loaded.decode(output[:, inputs["input_ids"].shape[1] :])
    return answer, stamps.times[0] - begin, seconds
