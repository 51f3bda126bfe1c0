"""What the search asks of a model: which settings there are, what each costs, what it answers on which samples."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from rich.console import Console

from tokenprune.cost import share
from tokenprune.evals.config.measure import Measure, Overlays
from tokenprune.evals.config.points import NONE, Point
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.errors import UserError, as_user_error
from tokenprune.evals.io.digest import digest
from tokenprune.evals.io.picture_reader import read_picture
from tokenprune.evals.tasks.load import load_task
from tokenprune.evals.tasks.task import Sample, Task
from tokenprune.evals.tuning.recommend.settings import SHARES, RecommendConfig
from tokenprune.registry import METHODS

COST_PROMPTS = 2
"""Prompts with a picture on which a setting's cost is taken, the same for all settings."""


OnAnswers = Callable[[int, str, bool], None]
"""Called with a number of answers, the label of their setting, and whether they were given now."""


class Bench(Protocol):
    """A model and its data, as the search sees them; tests put a table in its place."""

    @property
    def pictures(self) -> Sequence[str]:
        """Which picture each sample is about."""
        ...

    def open(self) -> None:
        """Get ready to answer; nothing heavy happens before."""

    @property
    def made_of(self) -> Mapping[str, Any]:
        """What besides the config decides an answer."""
        ...

    def settings(self) -> list[Point]:
        """What can be tried."""
        ...

    def cost(self, setting: Point) -> tuple[float, bool]:
        """As a share of the unpruned model's, and whether it was taken now. Raises ValueError where the model cannot
        take the setting."""
        ...

    def scores(
        self, settings: Sequence[Point | None], samples: Sequence[int], on_answers: OnAnswers
    ) -> list[list[float]]:
        """Score of each sample by setting, in the orders given; None is the unpruned model."""
        ...


def split(pictures: Sequence[str], seed: int) -> tuple[list[int], list[int]]:
    """Samples of the search half and of the held-out half: no picture is in both. Pictures come in an order drawn by
    the seed, each with all of its samples, and the first ones with half of the samples are searched on."""
    of: dict[str, list[int]] = {}
    for sample, picture in enumerate(pictures):
        of.setdefault(picture, []).append(sample)
    search: list[int] = []
    held_out: list[int] = []
    for picture in random.Random(seed).sample(list(of), len(of)):
        (search if len(search) < len(pictures) // 2 else held_out).extend(of[picture])
    return search, held_out


class ModelBench:
    """A model on a task. Every answer is written down at once, and none is asked for twice."""

    def __init__(self, config: RecommendConfig, console: Console) -> None:
        self._config, self._console = config, console
        self._task: Task = load_task(config.data)
        self._run = RunConfig(
            name="recommend", model=config.model, tasks=[config.data], methods=[NONE], seed=config.seed,
            batch_size=config.batch_size, dtype=config.dtype, device=config.device, output=str(config.folder),
            overlays=Overlays(samples=0), references=False,
        )  # fmt: skip
        samples = list(self._task.load(0, self._task.count(config.limit)))
        self.pictures = [_picture(sample) for sample in samples]
        self._ids = [sample.sample_id for sample in samples]
        self._unpruned = Point(config.model, config.data, NONE, None)

    def open(self) -> None:
        """Load the model and what was answered before."""
        from transformers.utils import logging

        from tokenprune.evals.evaluation.evaluate import SAMPLE_KEY
        from tokenprune.evals.io.row_store import RowStore
        from tokenprune.evals.models.load import load_model
        from tokenprune.evals.profiling.measure import MEASURE_KEY

        logging.disable_progress_bar()
        with as_user_error():
            self._loaded = load_model(self._config.model, self._config.dtype, self._config.device)
        self._answers = RowStore(self._config.folder / "samples.jsonl", SAMPLE_KEY)
        self._costs = RowStore(self._config.folder / "measures.jsonl", MEASURE_KEY)

    @property
    def made_of(self) -> Mapping[str, Any]:
        """See `Bench`."""
        from tokenprune.evals.evaluation.applied_method import settings_digest

        settings = settings_digest(self._run, self._loaded, self._task.fingerprint)
        made_of = {"model, code, task or seed": settings, "samples": digest(self._ids)}
        return {**made_of, "machine": self._machine()} if self._config.cost == "latency" else made_of

    def _machine(self) -> str:
        """What a latency depends on besides the setting; FLOPs and bytes do not."""
        from tokenprune.evals.profiling.hardware import clocked_on

        return digest(clocked_on(self._loaded.model))

    def settings(self) -> list[Point]:
        """Methods x budgets; without --methods, those that need no hints such as boxes."""

        names = self._config.methods or [name for name, cls in METHODS.loaded().items() if not cls.hints]
        blind = [name for name in names if METHODS.get(name).hints]
        if blind:
            needs = ", ".join(METHODS.get(blind[0]).hints)
            raise ValueError(f"{blind[0]} needs {needs}, which nobody knows in use, so it cannot be recommended.")
        budgets = self._config.budgets or default_budgets(self._loaded.adapter.num_tokens)
        return [Point(self._config.model, self._config.data, name, keep) for name in names for keep in budgets]

    def cost(self, setting: Point) -> tuple[float, bool]:
        """See `Bench`; measured once, and kept."""
        from tokenprune.evals.evaluation.applied_method import settings_digest
        from tokenprune.evals.evaluation.fingerprint import costs_fingerprint

        settings = settings_digest(self._run, self._loaded, self._task.fingerprint)
        measure = f"recommend {self._config.cost} by {costs_fingerprint()}"
        if self._config.cost == "latency":
            measure += f" on {self._machine()}"
        row = self._costs.get((settings, setting.key, measure))
        if row is not None:
            return row["cost"], False
        row = {"settings": settings, "point": setting.key, "measure": measure, "cost": self._measure(setting)}
        self._costs.append([row])
        return row["cost"], True

    def _measure(self, setting: Point) -> float:
        from tokenprune.evals.profiling.flops import measure_flops
        from tokenprune.evals.profiling.measure import pictured
        from tokenprune.evals.profiling.timing import measure_times

        prompts, _ = pictured(replace(self._task, size=len(self._ids)), COST_PROMPTS)
        if not prompts:  # a text alone costs the same pruned
            raise UserError(f"None of the samples of {self._config.data} has a picture, so there is nothing to prune.")
        if self._config.cost == "flops":
            flops = measure_flops(self._loaded, setting, prompts, self._config.seed, counting=False)
            return self._share(flops["analytic"]["total"], flops["unpruned"]["total"])
        how = Measure(repeats=5, warmup=1, decode_tokens=0, times=self._config.cost == "latency")
        row = measure_times(self._loaded, setting, prompts, how, self._config.seed)
        if self._config.cost == "latency":
            return row["times"]["to_unpruned"]["median"]
        return self._share(row["kv"]["analytic"], row["kv"]["unpruned"])

    def _share(self, pruned: float | None, unpruned: float | None) -> float:
        found = share(pruned, unpruned)
        if found is None:
            raise ValueError(
                f"The cost {self._config.cost!r} of {self._loaded.name} is not modelled. Use --cost latency, which is "
                "measured."
            )
        return found

    def scores(
        self, settings: Sequence[Point | None], samples: Sequence[int], on_answers: OnAnswers
    ) -> list[list[float]]:
        """See `Bench`; only what was not answered before is asked."""
        from tokenprune.evals.evaluation.evaluate import evaluate

        points = [self._unpruned if setting is None else setting for setting in settings]
        there = len(self._answers)

        def on_progress(done: int, label: str) -> None:
            nonlocal there
            now = len(self._answers)
            on_answers(done, label, now > there)
            there = now

        asked = evaluate(self._run, self._loaded, self._only(samples), points, self._answers, on_progress)
        keys = [[(asked.settings, point.key, asked.ids[i]) for i in range(len(samples))] for point in points]
        rows = [[self._answers.get(key) or {} for key in of_point] for of_point in keys]
        failed = [row for of_point in rows for row in of_point if row.get("correct") is None]
        if failed:
            raise UserError(
                f"Sample {failed[0].get('sample_id')} has no answer by {failed[0].get('point')}: "
                f"{failed[0].get('error')}. "
                "Accuracies can only be compared on the same samples; leave the sample or the method out."
            )
        return [[float(row["correct"]) for row in of_point] for of_point in rows]

    def _only(self, samples: Sequence[int]) -> Task:
        """The task with these samples, in this order."""

        def load(start: int, stop: int) -> Any:
            for sample in samples[start:stop]:
                yield from self._task.load(sample, sample + 1)

        return replace(self._task, size=len(samples), load=load)


def default_budgets(num_tokens: int | None) -> list[int | float]:
    """`SHARES` of an image's tokens; as fractions where images differ in size."""
    if num_tokens is None:
        return [round(share, 3) for share in SHARES]
    return list(dict.fromkeys(max(1, round(share * num_tokens)) for share in SHARES))


def _picture(sample: Sample) -> str:
    hasher = hashlib.sha256()
    for frame in sample.frames:
        hasher.update(repr(frame.size).encode() + read_picture(frame).tobytes())
    return hasher.hexdigest()[:16]
