"""Asks a model every question of a task at every point of a grid, and keeps each answer as soon as it is there.

Batches are cut at fixed places of the task, whatever is finished already and however many processes share the work, and
a batch of which a row is missing is computed whole: a prompt's padding, and with it the last bits of its logits, are
then those of an undisturbed run of one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch

from tokenprune.evals.config.points import Point
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.evaluation.applied_method import SharedTower, answer_batch, settings_digest, visual_tokens
from tokenprune.evals.evaluation.batching import WHOLE, Share, batches
from tokenprune.evals.evaluation.retry import Failure, retry_in_halves
from tokenprune.evals.evaluation.scored import scored
from tokenprune.evals.evaluation.vllm_engine import VllmAsking, VllmModel
from tokenprune.evals.io.row_store import RowStore
from tokenprune.evals.io.rows import SampleRow
from tokenprune.evals.models.load import LoadedModel
from tokenprune.evals.tasks.task import Sample, Task, drawn_samples

Inputs = dict[str, Any]
"""What a processor made of a batch, by the name of a model's argument."""
SAMPLE_KEY = ("settings", "point", "sample_id")


@dataclass
class AskedSamples:
    """What was asked.

    Attributes:
        settings: the digest under which the rows are filed.
        ids: of the samples, by their place in the task; those of the process's own share.
    """

    settings: str
    ids: dict[int, str] = field(default_factory=dict)


class _Asking:
    """Answers of one batch after another; the inputs of a batch are made once for all points."""

    def __init__(self, loaded: LoadedModel, config: RunConfig, task: Task, points: list[Point]) -> None:
        self._loaded, self._seed = loaded, config.seed
        self._task, self._max_new_tokens = task, config.max_new_tokens or task.max_new_tokens
        shared = SharedTower(loaded, points, config.seed) if config.share_tower and len(points) > 1 else None
        self._shared = shared if shared is not None and shared.possible else None
        self._batch: tuple[str, ...] = ()
        self._inputs: tuple[Inputs, Inputs | None] | None = None

    def start(self, samples: list[Sample]) -> None:
        """Forget the inputs of the last batch."""
        self._batch, self._inputs = tuple(sample.sample_id for sample in samples), None

    def _prepare(self, samples: list[Sample]) -> tuple[Inputs, Inputs | None]:
        """Inputs with pixels and, where the tower is shared, with features in their place."""
        if self._inputs is not None and self._batch == tuple(sample.sample_id for sample in samples):
            return self._inputs
        raw = dict(self._loaded.inputs([s.question for s in samples], [s.image for s in samples]))
        with torch.inference_mode():
            inputs = raw, self._shared.encode(raw) if self._shared else None
        # parts of a batch come after memory ran out, or one point failed: they are not worth keeping
        self._inputs = inputs if len(samples) == len(self._batch) else None
        return inputs

    def rows(self, point: Point, samples: list[Sample]) -> list[dict[str, Any]]:
        """What a model says at a point, one row a sample, without the names that it is filed under."""
        raw, encoded = self._prepare(samples)
        given = encoded if encoded is not None and self._shared and self._shared.covers(point) else raw
        texts, counts, kept = answer_batch(self._loaded, point, samples, given, self._seed, self._max_new_tokens)
        before = visual_tokens(self._loaded, raw)
        return [
            {
                "prediction": text,
                **scored(self._task, sample, text),
                "visual_tokens": before[i],
                "kept_tokens": counts[i],
                "kept": kept[i],
                "batch": len(samples),
            }
            for i, (sample, text) in enumerate(zip(samples, texts, strict=True))
        ]


_NOTHING = {"prediction": None, "correct": None, "visual_tokens": None, "kept_tokens": None, "kept": None, "batch": 1}


def evaluate(
    config: RunConfig,
    loaded: LoadedModel | VllmModel,
    task: Task,
    points: list[Point],
    store: RowStore[SampleRow],
    on_progress: Callable[[int, str], None] = lambda done, label: None,
    share: Share = WHOLE,
) -> AskedSamples:
    """Answer every sample at every point, skipping what the store holds already.

    The batches go round the points, not the points round the batches, so that a picture is read and processed once. A
    sample that raises gets a row with its `error`, and is asked again by the next run.

    Args:
        points: of this model and task.
        store: rows keyed by `SAMPLE_KEY`.
        on_progress: called with the number of newly counted samples and the point's label.
        share: which of the batches are this process's.

    Raises:
        DiskRefuses: the disk takes no more rows.
    """
    answered = AskedSamples(settings_digest(config, loaded, task.fingerprint))
    drawn = set(drawn_samples(task, config.overlays.samples, config.limit))
    given = (config, task, points)
    asking = VllmAsking(loaded, *given) if isinstance(loaded, VllmModel) else _Asking(loaded, *given)
    for batch in batches(task, config.limit, config.prompts_together, share):
        answered.ids.update(batch.ids)
        drawn_ids = {batch.ids[place] for place in drawn & set(batch.ids)}
        asking.start(batch.samples)
        for point in points:
            missing = [i for i in batch.ids.values() if (answered.settings, point.key, i) not in store]
            on_progress(len(batch.ids) - len(missing), point.label)
            if not missing:
                continue
            head = {"settings": answered.settings, "point": point.key}
            empty = {"family": "", "question": "", "answer": None, **_NOTHING}
            rows = [{**head, "sample_id": i, **empty, **failure.as_dict()} for i, failure in batch.unread.items()]
            readable = any(sample.sample_id in missing for sample in batch.samples)
            answers = retry_in_halves(batch.samples, partial(asking.rows, point)) if readable else []
            for sample, said in zip(batch.samples, answers):
                row: dict[str, Any] = {
                    **head,
                    "sample_id": sample.sample_id,
                    "family": sample.family,
                    "question": sample.question,
                    "answer": sample.answer,
                }
                row.update({**_NOTHING, **said.as_dict()} if isinstance(said, Failure) else said)
                if sample.sample_id not in drawn_ids:
                    row["kept"] = None  # where they are is kept for the samples that are drawn
                rows.append(row)
            # rows that are there already stay: the batch was computed whole for the sake of those that are missing
            store.append([cast(SampleRow, row) for row in rows if row["sample_id"] in missing])
            on_progress(len(missing), point.label)
    return answered


def outdated_answers(
    config: RunConfig, loaded: LoadedModel | VllmModel, task: Task, points: list[Point], store: RowStore[SampleRow]
) -> str:
    """Why answers that a run folder holds of these points are not used again, as a sentence; "" where all are."""
    settings, keys = settings_digest(config, loaded, task.fingerprint), {point.key for point in points}
    others = [row["settings"] for row in store.rows() if row["point"] in keys and row["settings"] != settings]
    if not others:
        return ""
    same_run = sum(other.partition(".")[0] == settings.partition(".")[0] for other in others)
    what = [f"{same_run} with other questions or data of the task"] if same_run else []
    if same_run < len(others):
        rest = len(others) - same_run
        what.append(f"{rest} by other code or weights, or with another dtype, seed or max_new_tokens")
    return (
        f"{len(others)} answers in {store.path.parent} were given {' and '.join(what)}. They stay in the file and "
        "do not count; their samples are asked again."
    )
