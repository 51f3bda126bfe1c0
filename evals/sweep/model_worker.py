"""The work of a run on one model: answers, then costs and pictures. Executors decide which process does which of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from rich.console import Console
from transformers.utils import logging

from tokenprune.evals.config.engines import VLLM
from tokenprune.evals.config.points import Point, spoken
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.errors import as_user_error
from tokenprune.evals.evaluation.applied_method import check_points
from tokenprune.evals.evaluation.batching import WHOLE, Share
from tokenprune.evals.evaluation.evaluate import SAMPLE_KEY, AskedSamples, evaluate, outdated_answers
from tokenprune.evals.evaluation.vllm_engine import VllmModel, start
from tokenprune.evals.io.progress import show_progress, waiting
from tokenprune.evals.io.row_store import folder_store
from tokenprune.evals.models.load import LoadedModel, load_model
from tokenprune.evals.profiling.from_sizes import count_from_sizes
from tokenprune.evals.profiling.measure import MEASURE_KEY, measure
from tokenprune.evals.report.pictures import save_pictures
from tokenprune.evals.tasks.load import load_task
from tokenprune.evals.tasks.task import Task


@dataclass
class Worked:
    """What an executor leaves besides the rows in the run folder.

    Attributes:
        answered: settings and sample ids by model and task.
        notes: sentences that a reader of the results must know.
        machines: by model, which machine measured its costs, see `measure.measure_key`.
    """

    answered: dict[tuple[str, str], AskedSamples] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    machines: dict[str, str] = field(default_factory=dict)

    def take(self, other: Worked) -> None:
        """Add what another process, or the work on another model, left."""
        self.answered.update(other.answered)
        self.notes += other.notes
        self.machines.update(other.machines)


class Executor(Protocol):
    """Who does the work: from points to rows in the run folder. `executors/` has one a file.

    Attributes:
        first: whether this process writes the results, once the work is done.
        writer: the name under which it writes rows, see `row_store.folder_store`.
    """

    first: bool
    writer: str

    def work(self, config: RunConfig, points: list[Point], tasks: dict[str, Task], console: Console) -> Worked:
        """Answer, measure and draw."""
        ...


class ModelWorker:
    """One model, loaded, and the points of a run that use it. Every method was tried on it once.

    Args:
        points: of any models; the others are left alone.
        tasks: by name; loaded here where missing.

    Raises:
        UserError: the model or a task cannot be loaded, or a method cannot work on them.
    """

    def __init__(
        self, config: RunConfig, model: str, points: list[Point], console: Console, tasks: dict[str, Task] | None = None
    ) -> None:
        self.config, self.model, self.console = config, model, console
        self.points = {name: [p for p in points if (p.model, p.task) == (model, name)] for name in config.all_tasks}
        self.points = {name: of_task for name, of_task in self.points.items() if of_task}
        logging.disable_progress_bar()
        torch.manual_seed(config.seed)
        self.served: VllmModel | None = None
        loading = f"Loading {model} and trying {sum(map(len, self.points.values()))} points on it"
        with as_user_error(), waiting(console, loading):
            self.tasks = {name: (tasks or {}).get(name) or load_task(name) for name in self.points}
            if config.engine == VLLM:
                self.served = start(config, model, [point for of_task in self.points.values() for point in of_task])
                return
            self.loaded = load_model(model, config.dtype, config.device)
            for name, of_task in self.points.items():
                check_points(self.loaded, self.tasks[name], of_task, config.seed)

    @property
    def _asked(self) -> LoadedModel | VllmModel:
        return self.served or self.loaded

    def close(self) -> None:
        """Give back what an engine of its own holds."""
        if self.served is not None:
            self.served.shut_down()

    def answer(self, share: Share = WHOLE, writer: str = "") -> dict[tuple[str, str], AskedSamples]:
        """Answer the samples of a share at all points, into the rows of `writer`."""
        store = folder_store(self.config.folder, "samples", SAMPLE_KEY, writer)
        answered: dict[tuple[str, str], AskedSamples] = {}
        for name, of_task in self.points.items():
            task = self.tasks[name]
            count = task.count(self.config.limit)
            limited = f", the first {count} of {task.size} samples" if self.config.limit else ""
            self.console.print(f"{self.model} on {task.name}: {len(of_task)} points{limited}", markup=False)
            if outdated := outdated_answers(self.config, self._asked, task, of_task, store):
                self.console.print(outdated, markup=False)
            with show_progress(self.console) as progress:
                places = range(count)
                size = self.config.prompts_together
                mine = sum(1 for place in places if place // size % share.of == share.rank)
                bar = progress.add_task("answers", total=mine * len(of_task))

                def advance(done: int, label: str) -> None:
                    progress.update(bar, advance=done, description=f"answers  {spoken(label)}")  # noqa: B023

                answered[self.model, name] = evaluate(self.config, self._asked, task, of_task, store, advance, share)
                progress.update(bar, description="answers")
        return answered

    def measure(self, answered: dict[tuple[str, str], AskedSamples], writer: str = "") -> Worked:
        """Measure times and FLOPs of all points into the rows of `writer`, and save pictures of what the model sees.

        Returns:
            Notes and the machine.
        """
        costs = folder_store(self.config.folder, "measures", MEASURE_KEY, writer)
        worked = Worked()
        for name, of_task in self.points.items():
            task, asked = self.tasks[name], answered[self.model, name]
            with show_progress(self.console) as progress:
                bar = progress.add_task("times and FLOPs", total=len(of_task))

                def advance(label: str) -> None:
                    progress.update(bar, advance=1, description=f"times and FLOPs  {spoken(label)}")  # noqa: B023

                if self.served is not None:
                    given = (self.config, self.model, task, of_task, costs, asked.settings, advance)
                    worked.machines[self.model] = count_from_sizes(*given)
                    continue
                machine = measure(self.config, self.loaded, task, of_task, costs, asked.settings, advance)
                worked.machines[self.model] = machine
                progress.update(bar, description="times and FLOPs")
            worked.notes += save_pictures(self.loaded, task, name, self.config)
        return worked
