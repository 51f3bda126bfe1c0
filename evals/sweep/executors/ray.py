"""Grid points spread over a Ray cluster, one task a point, then one task a model that measures and draws.

The run folder must be on a file system that all machines of the cluster share. A task whose worker died is started
again by Ray, and goes on with the rows that the dead one left.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from tokenprune.evals.config.points import Point
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.errors import UserError
from tokenprune.evals.evaluation.evaluate import AskedSamples
from tokenprune.evals.io.digest import digest
from tokenprune.evals.io.folder_lock import holder_file, lock_folder
from tokenprune.evals.io.progress import show_progress
from tokenprune.evals.sweep.model_worker import ModelWorker, Worked
from tokenprune.evals.tasks.task import Task
from tokenprune.user_files import VARIABLE

RETRIES = 3
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "120"}
"""Of Ray, where the user has not set them: it tells nobody that it runs, and may start slowly on a busy machine."""


class RayCluster:
    """A Ray cluster: that of `RAY_ADDRESS`, or one that is started on this machine.

    Args:
        gpus: share of a GPU that each point gets (0.5 puts two on one); by default a whole one where the cluster has
            any.
        cpus: cores that each point gets.

    Raises:
        UserError: Ray is not installed.
    """

    first = True
    writer = ""

    def __init__(self, gpus: float | None = None, cpus: float = 1) -> None:
        if importlib.util.find_spec("ray") is None:
            raise UserError("--executor ray needs Ray: pip install 'tokenprune-vlm[ray]'.")
        if cpus <= 0 or (gpus or 0) < 0:
            raise UserError(
                f"A point needs some CPUs and no negative share of GPUs, got {cpus:g} CPUs and {gpus or 0:g} GPUs."
            )
        self.gpus, self.cpus = gpus, cpus

    def work(self, config: RunConfig, points: list[Point], tasks: dict[str, Task], console: Console) -> Worked:
        """Answer all points, as many at a time as the cluster has room for; then measure one model after the other."""
        import ray

        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        ours = not ray.is_initialized()
        if ours:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        try:
            return self._work(config, points, console)
        finally:
            if ours:
                ray.shutdown()

    def _work(self, config: RunConfig, points: list[Point], console: Console) -> Worked:
        import ray
        from ray.exceptions import WorkerCrashedError

        needs: Any = self._resources(ray.cluster_resources())
        # workers of a cluster that runs already know nothing of our environment
        here = (os.getcwd(), os.environ.get(VARIABLE, ""))
        answering: Any = ray.remote(**needs, max_retries=RETRIES)(_answer)
        running = {answering.remote(config, point, here): point for point in points}
        worked = Worked()
        with show_progress(console) as progress:
            bar = progress.add_task("points", total=len(points))
            while running:
                done, _ = ray.wait(list(running), timeout=1.0)
                for reference in done:
                    point = running.pop(reference)
                    try:
                        answered = ray.get(reference)
                    except WorkerCrashedError:
                        worked.notes.append(f"{point.label} on {point.task}: its worker died {RETRIES + 1} times.")
                        continue
                    worked.answered.update(answered)
                    progress.update(bar, advance=1, description=f"points  {point.label}")
            progress.update(bar, description="points")
        # times are taken by one task at a time, on a whole GPU
        needs["num_gpus"] = max(1, needs["num_gpus"]) if needs["num_gpus"] else 0
        measuring: Any = ray.remote(**needs, max_retries=RETRIES)(_measure)
        for model in config.models:
            of_model = [point for point in points if point.model == model and (model, point.task) in worked.answered]
            if of_model:
                worked.take(ray.get(measuring.remote(config, model, of_model, worked.answered, here)))
        return worked

    def _resources(self, cluster: Mapping[str, float]) -> dict[str, float]:
        gpus = self.gpus if self.gpus is not None else float(cluster.get("GPU", 0) > 0)
        for kind, wanted in (("GPU", gpus), ("CPU", self.cpus)):
            if wanted > cluster.get(kind, 0):
                raise UserError(f"A point is to get {wanted:g} {kind}s, the Ray cluster has {cluster.get(kind, 0):g}.")
        return {"num_gpus": gpus, "num_cpus": self.cpus}


def _start(config: RunConfig, here: tuple[str, str]) -> None:
    """Relative paths are meant from where the run was started, and files that it imported are imported."""
    folder, imports = here
    os.environ.pop(VARIABLE, None)  # of the run that this worker served before
    if imports:
        os.environ[VARIABLE] = imports
    if not Path(folder).is_dir():
        raise UserError(f"{os.uname().nodename} has no folder {folder}; run from one that all machines share.")
    os.chdir(folder)
    if not holder_file(config.folder).exists():
        raise UserError(
            f"{os.uname().nodename} does not see {config.folder.resolve()}; give --output on a file system that all "
            "machines share."
        )


def _answer(config: RunConfig, point: Point, here: tuple[str, str]) -> dict[tuple[str, str], AskedSamples]:
    """In a worker: one point, into files that no other worker writes."""
    _start(config, here)
    writer = f"ray-{digest(point.key)[:8]}"
    # a worker that Ray takes for dead may take a moment to die
    with lock_folder(config.folder, writer, wait=30.0):
        return ModelWorker(config, point.model, [point], Console(quiet=True)).answer(writer=writer)


def _measure(
    config: RunConfig,
    model: str,
    points: list[Point],
    answered: dict[tuple[str, str], AskedSamples],
    here: tuple[str, str],
) -> Worked:
    """In a worker: times, FLOPs and pictures of one model."""
    _start(config, here)
    writer = f"ray-{digest(model)[:8]}"
    with lock_folder(config.folder, writer, wait=30.0):
        return ModelWorker(config, model, points, Console(quiet=True)).measure(answered, writer)
