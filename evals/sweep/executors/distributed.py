"""Several processes, on one machine or more, started by `accelerate launch` or torchrun: each asks every n-th batch.

The run folder must be the same folder for all of them: a local one on one machine, a shared one on several.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import replace
from datetime import timedelta
from typing import Any

from rich.console import Console

from tokenprune.evals.config.points import Point
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.errors import UserError
from tokenprune.evals.evaluation.batching import Share
from tokenprune.evals.evaluation.evaluate import AskedSamples
from tokenprune.evals.io.folder_lock import holder_file
from tokenprune.evals.sweep.model_worker import ModelWorker, Worked
from tokenprune.evals.tasks.task import Task

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
_PATIENCE = timedelta(days=7)  # one process may be done long before another


def launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return all(name in os.environ for name in _LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1


class Processes:
    """This process and its siblings. Rank 0 measures and writes."""

    def __init__(self) -> None:
        import torch
        import torch.distributed.nn.functional  # whose default arguments, imported later, would keep the group alive
        from accelerate import PartialState

        self._ours = not torch.distributed.is_initialized()
        self._state: Any = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
        self.share = Share(self._state.process_index, self._state.num_processes)
        if self.share.of != int(os.environ["WORLD_SIZE"]):
            raise UserError(f"{os.environ['WORLD_SIZE']} processes were launched, but they found {self.share.of}.")
        self.first = self.share.rank == 0
        self.writer = "" if self.first else f"rank{self.share.rank}"

    def work(self, config: RunConfig, points: list[Point], tasks: dict[str, Task], console: Console) -> Worked:
        """Answer a share of each model's batches; measure and draw on rank 0, while the others wait."""
        self._state.wait_for_everyone()
        if not holder_file(config.folder).exists():
            raise UserError(
                f"Process {self.share.rank} does not see the files of the first one in {config.folder.resolve()}; give "
                "--output on a file system that all machines share."
            )
        config = replace(config, device=config.device or str(self._state.device))
        worked = Worked()
        for model in config.models:
            worker = ModelWorker(config, model, points, console, tasks)
            worked.answered.update(self._together(worker.answer(self.share, self.writer)))
            if self.first:
                worked.take(worker.measure(worked.answered))
            self._state.wait_for_everyone()
        if self._ours:
            # A thread of gloo's that lets go of its last tensors while the interpreter ends takes the process with it
            # (SIGABRT), and the launcher calls a finished run failed. Leaving the group first waits for these threads.
            atexit.register(self._state.destroy_process_group)
        return worked

    def _together(self, answers: dict[tuple[str, str], AskedSamples]) -> dict[tuple[str, str], AskedSamples]:
        """The samples of all shares; waits until every process is done."""
        from accelerate.utils import gather_object

        together: dict[tuple[str, str], AskedSamples] = {}
        for each in gather_object([answers]):
            for key, answered in each.items():
                known = together.setdefault(key, AskedSamples(answered.settings))
                if known.settings != answered.settings:
                    raise UserError(
                        "The processes of this run have different code or weights; their answers don't mix."
                    )
                known.ids.update(answered.ids)
        return together
