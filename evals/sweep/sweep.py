"""Runs a grid: answers and costs, then files. A run that was killed goes on where it was."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from tokenprune.evals.config.engines import VLLM
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.errors import UserError, as_user_error
from tokenprune.evals.evaluation.evaluate import SAMPLE_KEY
from tokenprune.evals.io.atomic_files import replace_file
from tokenprune.evals.io.folder_lock import lock_folder
from tokenprune.evals.io.outputs import check_folder
from tokenprune.evals.io.row_store import folder_store
from tokenprune.evals.profiling.measure import MEASURE_KEY, read_costs
from tokenprune.evals.results.complete_samples import count_rows
from tokenprune.evals.results.over_seeds import write_seeds
from tokenprune.evals.results.over_tasks import pool_costs, pool_tasks, pooled_note
from tokenprune.evals.results.records import ResultRecord
from tokenprune.evals.results.summary import provenance, summarise, write_results
from tokenprune.evals.sweep.earlier_run import check_earlier, left_out
from tokenprune.evals.sweep.executors.distributed import Processes, launched
from tokenprune.evals.sweep.executors.local import Local
from tokenprune.evals.sweep.model_worker import Executor, Worked
from tokenprune.evals.tasks.load import cut_short, load_task
from tokenprune.evals.tasks.task import Task


@dataclass
class Run:
    """What a finished run left; records and files are empty in a process that only helped another one.

    Attributes:
        records: one per point, see `summary.summarise`.
        files: the files written.
        seconds: how long this process worked on it.
        warnings: sentences that a reader of the table must know.
    """

    config: RunConfig
    records: list[ResultRecord]
    files: list[Path]
    seconds: float
    warnings: list[str]


def run(
    config: RunConfig, console: Console | None = None, executor: Executor | None = None, force: bool = False
) -> Run:
    """Evaluate, measure and write. Every name and number is checked before a model is loaded or a sample is asked.

    Args:
        executor: who does the work, see `model_worker.Executor`; by default this process, or all of those that
            `accelerate launch` or torchrun started.
        force: whether finished results of other settings in the folder may be replaced.

    Raises:
        UserError: what was asked for cannot be run, another process is writing to the folder, it holds finished results
            of other settings, or the disk is full.
    """
    console = console or Console()
    begin = time.perf_counter()
    with as_user_error():
        config.check()
        check_folder(config.folder)
        if not force:
            check_earlier(config)
        tasks = {name: load_task(name) for name in config.all_tasks}
        config.folder.mkdir(parents=True, exist_ok=True)
    if config.engine == VLLM and (executor is not None or launched()):
        raise UserError(
            "engine: vllm deals its own work out: start one process without a launcher or --executor, and say "
            "engine_options: {tensor_parallel_size: N} for N GPUs."
        )
    executor = executor or (Processes() if launched() else Local())
    if not executor.first:
        console = Console(quiet=True)
    with lock_folder(config.folder, executor.writer):
        worked = executor.work(config, config.points(), tasks, console)
        if not executor.first:
            return Run(config, [], [], time.perf_counter() - begin, [])
        return _write(config, worked, tasks, begin)


def _write(config: RunConfig, worked: Worked, tasks: dict[str, Task], begin: float) -> Run:
    """From the rows in the folder to results."""
    from tokenprune.evals.report.page import write_report
    from tokenprune.evals.report.plots import plot_pareto
    from tokenprune.evals.results.run_folder import read_run

    folder = config.folder
    answers = folder_store(folder, "samples", SAMPLE_KEY)
    counted = count_rows(answers, config.points(), worked.answered)
    costs = folder_store(folder, "measures", MEASURE_KEY)
    measures, said = read_costs(config, counted.points, worked.answered, costs, worked.machines)
    notes = [*worked.notes, *counted.notes, *said, *left_out(config, answers.rows())]
    pooled, pooled_rows = pool_tasks(counted.points, counted.rows)
    notes += pooled_note(pooled, counted.points, counted.rows)
    for point in pooled:
        parts = [replace(point, task=task).key for task in tasks]
        measures[point.key] = pool_costs(point, counted.points, measures)
        counted.failed[point.key] = sum(counted.failed.get(key, 0) for key in parts)
    records = summarise([*counted.points, *pooled], {**counted.rows, **pooled_rows}, measures, config.seed)
    for record in records:
        rows = counted.rows.get(record["point"])
        if record["task"].endswith((".yaml", ".yml")):
            record["task_name"] = tasks[record["task"]].name
        record["failed"] = counted.failed[record["point"]]
        record["metrics"] = {} if rows is None else tasks[record["task"]].metrics(rows)
    seconds = time.perf_counter() - begin
    origin = provenance(config, seconds)
    origin["notes"], origin["limited"] = notes, cut_short(config.all_tasks, config.limit)
    files = [write_config(config), *write_results(folder, records, counted.rows, origin, counted.others)]
    files += write_seeds(folder, records)
    files.append(plot_pareto(records, folder / "pareto.png"))
    files.append(write_report(folder / "report.html", [read_run(folder)]))
    return Run(config, records, files, seconds, notes)


def write_config(config: RunConfig) -> Path:
    """The settings of a run as YAML, next to its results."""
    import yaml

    config.folder.mkdir(parents=True, exist_ok=True)
    return replace_file(config.folder / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))
