"""Runs a grid: answers and costs, then files. A run that was killed goes on where it was."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from tokenprune.evals.answering import SAMPLE_KEY
from tokenprune.evals.config import Point, RunConfig, refusing
from tokenprune.evals.costs import MEASURE_KEY, read_costs
from tokenprune.evals.counting import count_rows
from tokenprune.evals.executors.local import Local
from tokenprune.evals.executors.processes import Processes, launched
from tokenprune.evals.files import replace_file
from tokenprune.evals.lock import held
from tokenprune.evals.results import Record, provenance, summarise, write_results
from tokenprune.evals.store import folder_store
from tokenprune.evals.tasks import load_task
from tokenprune.evals.work import Executor, Worked

ALL_TASKS = "all"


@dataclass
class Run:
    """What a finished run left; records and files are empty in a process that only helped another one.

    Attributes:
        records: one per point, see `results.summarise`.
        files: the files written.
        seconds: how long this process worked on it.
        warnings: sentences that a reader of the table must know.
    """

    config: RunConfig
    records: list[Record]
    files: list[Path]
    seconds: float
    warnings: list[str]


def run(config: RunConfig, console: Console | None = None, executor: Executor | None = None) -> Run:
    """Evaluate, measure and write. Every name and number is checked before a model is loaded or a sample is asked.

    Args:
        executor: who does the work, see `work.Executor`; by default this process, or all of those that
            `accelerate launch` or torchrun started.

    Raises:
        Refused: what was asked for cannot be run, another process is writing to the folder, or the disk is full.
    """
    console = console or Console()
    begin = time.perf_counter()
    with refusing():
        config.check()
        tasks = {name: load_task(name) for name in config.tasks}
        config.folder.mkdir(parents=True, exist_ok=True)
    executor = executor or (Processes() if launched() else Local())
    if not executor.first:
        console = Console(quiet=True)
    with held(config.folder, executor.writer):
        worked = executor.work(config, config.points(), tasks, console)
        if not executor.first:
            return Run(config, [], [], time.perf_counter() - begin, [])
        return _write(config, worked, begin)


def _write(config: RunConfig, worked: Worked, begin: float) -> Run:
    """From the rows in the folder to results."""
    from tokenprune.evals.plots import plot_pareto
    from tokenprune.evals.report import write_report

    folder = config.folder
    counted = count_rows(folder_store(folder, "samples", SAMPLE_KEY), config.points(), worked.answered)
    costs = folder_store(folder, "measures", MEASURE_KEY)
    measures, said = read_costs(config, counted.points, worked.answered, costs)
    notes = [*worked.notes, *counted.notes, *said]
    pooled, pooled_rows = pool_tasks(counted.points, counted.rows)
    for point in pooled:
        measures[point.key] = measures.get(replace(point, task=config.tasks[0]).key, {})
        parts = [replace(point, task=task).key for task in config.tasks]
        counted.failed[point.key] = sum(counted.failed[key] for key in parts)
    records = summarise([*counted.points, *pooled], {**counted.rows, **pooled_rows}, measures, config)
    for record in records:
        record["failed"] = counted.failed[record["point"]]
    seconds = time.perf_counter() - begin
    origin = provenance(config, seconds)
    every = {**counted.rows, **pooled_rows}
    files = [write_config(config), *write_results(folder, records, every, origin, counted.others)]
    files.append(plot_pareto(records, folder / "pareto.png"))
    files.append(write_report(folder / "report.html", config, records, worked.pictures, origin, notes))
    if worked.pictures:
        files.append(folder / "overlays")
    return Run(config, records, files, seconds, notes)


def pool_tasks(points: list[Point], rows: dict[str, list[Record]]) -> tuple[list[Point], dict[str, list[Record]]]:
    """With several tasks, a further task `all` that holds the samples of all of them, for the points that have answers
    to all; nothing with one task."""
    tasks = {point.task for point in points}
    if len(tasks) < 2:
        return [], {}
    pooled: dict[str, list[Record]] = {}
    found: dict[str, Point] = {}
    for point in points:
        if any(replace(point, task=task).key not in rows for task in tasks):
            continue
        whole = replace(point, task=ALL_TASKS)
        found[whole.key] = whole
        pooled.setdefault(whole.key, []).extend(rows[point.key])
    return list(found.values()), pooled


def write_config(config: RunConfig) -> Path:
    """The settings of a run as YAML, beside its results."""
    import yaml

    config.folder.mkdir(parents=True, exist_ok=True)
    return replace_file(config.folder / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))
