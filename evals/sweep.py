"""Runs a grid: answers, then costs, then files. A run that was killed goes on where it was."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tokenprune.evals.config import Point, RunConfig, digest, refusing
from tokenprune.evals.models import LoadedModel, load_model
from tokenprune.evals.results import Record, collect_rows, provenance, replace_file, summarise, write_results
from tokenprune.evals.runner import SAMPLE_KEY, check_points, evaluate
from tokenprune.evals.seeds import write_seeds
from tokenprune.evals.store import RowStore
from tokenprune.evals.tasks import Task, cut_short, load_task

ALL_TASKS = "all"
MEASURE_KEY = ("settings", "point", "measure")


@dataclass
class Run:
    """What a finished run left.

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


@contextmanager
def show_progress(console: Console) -> Iterator[Progress]:
    """A progress bar with what is done, how long it took and how long it will take."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


def run(config: RunConfig, console: Console | None = None) -> Run:
    """Evaluate, measure and write. Every name and number is checked before a model is loaded or a sample is asked."""
    import torch
    from transformers.utils import logging

    from tokenprune.evals.pictures import save_pictures
    from tokenprune.evals.plots import plot_pareto
    from tokenprune.evals.report.page import write_report
    from tokenprune.evals.run_folder import read_run

    console = console or Console()
    begin = time.perf_counter()
    with refusing():
        config.check()
        tasks = {name: load_task(name) for name in config.all_tasks}
    logging.disable_progress_bar()
    torch.manual_seed(config.seed)
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    answers = RowStore(folder / "samples.jsonl", SAMPLE_KEY)
    costs = RowStore(folder / "measures.jsonl", MEASURE_KEY)
    points = config.points()
    rows: dict[str, list[Record]] = {}
    measures: dict[str, Record] = {}
    notes: list[str] = []
    for name in config.models:
        with refusing():
            loaded = load_model(name, config.dtype, config.device)
        for task_name, task in tasks.items():
            own = [point for point in points if (point.model, point.task) == (name, task_name)]
            if not own:
                continue
            with refusing():
                check_points(loaded, task, own, config.seed)
            settings, ids = _answer(config, loaded, task, own, answers, console)
            rows.update(collect_rows(answers, own, settings, ids))
            measured, said = _measure(config, loaded, task, own, costs, settings, console)
            measures.update(measured)
            notes += said
            notes += save_pictures(loaded, task, task_name, config.overlays.samples, config.limit, folder)
    pooled, pooled_rows = pool_tasks(points, rows)
    for point in pooled:
        first = next(task for task in tasks if replace(point, task=task).key in measures)
        measures[point.key] = measures[replace(point, task=first).key]
    records = summarise([*points, *pooled], {**rows, **pooled_rows}, measures, config.seed)
    for record in records:
        record["metrics"] = tasks[record["task"]].metrics(rows[record["point"]]) if record["task"] in tasks else {}
    seconds = time.perf_counter() - begin
    origin = {**provenance(config, seconds), "notes": notes, "limited": cut_short(config.all_tasks, config.limit)}
    files = [write_config(config), *write_results(folder, records, rows, origin)]
    files += write_seeds(folder, records)
    files.append(plot_pareto(records, folder / "pareto.png"))
    files.append(write_report(folder / "report.html", [read_run(folder)]))
    return Run(config, records, files, seconds, notes)


def pool_tasks(points: list[Point], rows: dict[str, list[Record]]) -> tuple[list[Point], dict[str, list[Record]]]:
    """With several tasks of a model, a further task `all` that holds the samples of all of them, for the points that
    were run on each; nothing with one task."""
    tasks: dict[str, set[str]] = {}
    counts: dict[str, int] = {}
    for point in points:
        tasks.setdefault(point.model, set()).add(point.task)
        whole = replace(point, task=ALL_TASKS)
        counts[whole.key] = counts.get(whole.key, 0) + 1
    pooled: dict[str, list[Record]] = {}
    found: dict[str, Point] = {}
    for point in points:
        whole = replace(point, task=ALL_TASKS)
        if not 2 <= len(tasks[point.model]) == counts[whole.key]:
            continue
        found[whole.key] = whole
        # two tasks may number their samples alike
        own = [{**row, "point": whole.key, "sample_id": f"{point.task}:{row['sample_id']}"} for row in rows[point.key]]
        pooled.setdefault(whole.key, []).extend(own)
    return list(found.values()), pooled


def _answer(
    config: RunConfig, loaded: LoadedModel, task: Task, points: list[Point], store: RowStore, console: Console
) -> tuple[str, list[str]]:
    total = task.count(config.limit) * len(points)
    limited = f", the first {task.count(config.limit)} of {task.size} samples" if config.limit else ""
    console.print(f"{loaded.name} on {task.name}: {len(points)} points{limited}")
    with show_progress(console) as progress:
        bar = progress.add_task("answers", total=total)

        def on_progress(done: int, label: str) -> None:
            progress.update(bar, advance=done, description=f"answers  {label}")

        found = evaluate(config, loaded, task, points, store, on_progress)
        progress.update(bar, description="answers")
    return found


def _measure(
    config: RunConfig,
    loaded: LoadedModel,
    task: Task,
    points: list[Point],
    store: RowStore,
    settings: str,
    console: Console,
) -> tuple[dict[str, Record], list[str]]:
    from tokenprune.evals.flops import measure_flops
    from tokenprune.evals.timing import measure_times

    seen = (sample for sample in task.load(0, task.size) if sample.visuals)  # a text alone costs the same pruned
    samples = list(islice(seen, config.measure.samples))
    plain: dict[str, dict[str, float]] = {}
    how = digest(asdict(config.measure))
    found: dict[str, Record] = {}
    notes: list[str] = []
    with show_progress(console) as progress:
        bar = progress.add_task("times and FLOPs", total=len(points))
        for point in points:
            progress.update(bar, description=f"times and FLOPs  {point.label}")
            row = store.get((settings, point.key, how))
            if row is None:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", UserWarning)
                    values: Record = measure_times(loaded, point, samples, config.measure, config.seed)
                    flops = measure_flops(loaded, point, samples, config.seed, config.measure.flops, plain)
                said = [str(warning.message) for warning in caught if "FLOPs" in str(warning.message)]
                row = {"settings": settings, "point": point.key, "measure": how, **values, "flops": flops}
                row["notes"] = said
                store.append([row])
            notes += row["notes"]
            found[point.key] = {name: row[name] for name in ("kv", "times", "flops")}
            progress.update(bar, advance=1)
        progress.update(bar, description="times and FLOPs")
    return found, notes


def write_config(config: RunConfig) -> Path:
    """The settings of a run as YAML, beside its results."""
    import yaml

    config.folder.mkdir(parents=True, exist_ok=True)
    return replace_file(config.folder / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))
