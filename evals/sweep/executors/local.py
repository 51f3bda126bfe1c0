"""One process does all of the work, one model after the other."""

from __future__ import annotations

from rich.console import Console

from tokenprune.evals.config.points import Point
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.sweep.model_worker import ModelWorker, Worked
from tokenprune.evals.tasks.task import Task


class Local:
    """This process alone."""

    first = True
    writer = ""

    def work(self, config: RunConfig, points: list[Point], tasks: dict[str, Task], console: Console) -> Worked:
        """Answer, measure and draw."""
        worked = Worked()
        for model in config.models:
            worker = ModelWorker(config, model, points, console, tasks)
            worked.answered.update(worker.answer())
            worked.take(worker.measure(worked.answered))
            worker.close()
        return worked
