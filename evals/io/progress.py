"""What is going on, for whoever waits: a bar on a terminal, a plain line every few seconds where there is none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET = 8.0
"""Most seconds without a word where there is no terminal: in a log, a batch job, a notebook's pipe."""


@contextmanager
def heartbeat(console: Console, line: Callable[[], str], every: float | None = None) -> Iterator[None]:
    """Print `line()` every few seconds while the block runs, whatever the block is busy with; on a terminal nothing,
    where a bar or a spinner moves by itself.

    Args:
        every: seconds between two lines; `QUIET` by default.
    """
    if console.is_terminal or console.quiet:
        yield
        return
    over = threading.Event()

    def beat() -> None:
        while not over.wait(QUIET if every is None else every):
            console.print(line(), markup=False, highlight=False, soft_wrap=True)

    thread = threading.Thread(target=beat, daemon=True, name="tokenprune-heartbeat")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


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
    with Progress(*columns, console=console) as progress, heartbeat(console, lambda: _bars_in_words(progress)):
        yield progress


def _bars_in_words(progress: Progress) -> str:
    said = []
    for task in progress.tasks:
        total = "" if task.total is None else f" of {task.total:g}"
        left = "" if task.time_remaining is None else f", about {clock(task.time_remaining)} left"
        said.append(f"{task.description}: {task.completed:g}{total}, {clock(task.elapsed or 0)} passed{left}")
    return "; ".join(said)


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """Say that something without steps goes on ("loading pocket-llava"): a spinner, or a line every few seconds."""
    begin = time.monotonic()
    with heartbeat(console, lambda: f"{what}: {clock(time.monotonic() - begin)} so far"):
        if console.is_terminal:
            with console.status(what):
                yield
        else:
            yield


def clock(seconds: float) -> str:
    """`0:03:20`, rounded to whole seconds."""
    return str(timedelta(seconds=round(seconds)))


def in_words(seconds: float) -> str:
    """`40 seconds`, `6 minutes`, `3.5 hours`: as exact as an estimate is."""
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
