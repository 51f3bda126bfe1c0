"""Kills a real sweep at random moments, again and again, and compares what it ends with to an undisturbed one.

    python -m tokenprune.evals.bench.survive --kills 20 --output runs/survive

The sweep is run once without disturbance. Moments of it are drawn at random, and in another folder its process gets
SIGKILL when it has come to the first of them, is started again, and so on; then it may finish. What must be equal byte
for byte: summary.csv without the columns of times, results.jsonl without times and provenance, the rows of answers.
Kills are counted by the phase they hit, read off the folder: "start" (imports, loading), "answers", "costs" (times and
FLOPs), "files" (pictures, tables, page).
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_TIMED = ("_ms", "prefill_to_", "selection_to_")
_SWEEP = {
    "model": "pocket-llava", "tasks": ["pocket"], "keep": [64], "methods": ["none", "vtc_cls", "divprune"],
    "batch_size": 2, "measure": {"samples": 1, "repeats": 1, "warmup": 0, "decode_tokens": 2},
    "overlays": {"samples": 2},
}  # fmt: skip


def table(folder: Path) -> bytes:
    """summary.csv without the columns of times."""
    with (folder / "summary.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    kept = [name for name in rows[0] if not any(part in name for part in _TIMED)]
    return "\n".join(",".join(row[name] for name in kept) for row in rows).encode()


def records(folder: Path) -> bytes:
    """results.jsonl without times and provenance."""
    text = (folder / "results.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.split("\n") if line]
    kept = [{name: value for name, value in line.items() if name not in ("times", "provenance")} for line in lines]
    return "\n".join(json.dumps(line) for line in kept).encode()


def answers(folder: Path) -> bytes:
    """The rows of answers, as written."""
    return (folder / "samples.jsonl").read_bytes()


def lines(file: Path) -> int:
    """Whole lines of a file."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


class Sweep:
    """The command, in a separate folder and, at each start, a new process.

    Args:
        config: the YAML of the sweep.
        fork: start processes as copies of this one, which has imported everything.
    """

    def __init__(self, config: Path, folder: Path, fork: bool) -> None:
        self.config, self.folder, self.asked = config, folder, folder.with_name(f"{folder.name}.asked")
        self._context: Any = multiprocessing.get_context("fork" if fork else "spawn")
        self.asked.unlink(missing_ok=True)

    def start(self) -> BaseProcess:
        """A process that runs the sweep, or goes on with it."""
        process = self._context.Process(target=child, args=(self.asked, str(self.config), str(self.folder)))
        process.start()
        return process

    def state(self) -> tuple[int, int]:
        """Rows of answers and of costs."""
        return lines(self.folder / "samples.jsonl"), lines(self.folder / "measures.jsonl")

    def asked_rows(self) -> int:
        """Samples that were asked, those whose answers a kill threw away included."""
        return sum(map(int, self.asked.read_text().split())) if self.asked.exists() else 0


def child(asked: Path, config: str, output: str) -> None:
    """The command line's sweep, with a note of each batch before it is asked, outside the run folder."""
    from tokenprune.cli import main as command
    from tokenprune.evals.evaluation import evaluate as answering

    silent = os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    real = answering.answer_batch

    def counted(loaded: Any, point: Any, samples: Any, *options: Any) -> Any:
        with asked.open("a") as stream:
            stream.write(f"{len(samples)}\n")
        return real(loaded, point, samples, *options)

    answering.answer_batch = counted
    sys.exit(command(["sweep", config, "--output", output]))


def undisturbed(sweep: Sweep) -> list[tuple[float, tuple[int, int]]]:
    """Run once; when each state was first seen, in seconds, and at the end the end."""
    begin = time.perf_counter()
    seen = [(0.0, (0, 0))]
    process = sweep.start()
    while process.is_alive():
        state = sweep.state()
        if state != seen[-1][1]:
            seen.append((time.perf_counter() - begin, state))
        time.sleep(0.02)
    if process.exitcode:
        raise RuntimeError(f"The undisturbed sweep ended with status {process.exitcode}; see {sweep.folder}.log.")
    return [*seen, (time.perf_counter() - begin, sweep.state())]


def wait_for(sweep: Sweep, process: BaseProcess, state: tuple[int, int], seconds: float) -> None:
    """Until the sweep has come to a state, and for some time more; or until it ends."""
    while process.is_alive() and sweep.state() < state:
        time.sleep(0.01)
    process.join(seconds)


def phase(before: tuple[int, int], after: tuple[int, int], complete: tuple[int, int], started: bool) -> str:
    """Where a process was when it was killed.

    Args:
        before, after: rows of answers and of costs when it was started and killed.
        whole: the same when all work is done.
        started: whether it had lived as long as the undisturbed one took to its first row.
    """
    if after == before and not started:
        return "start"
    return "answers" if after[0] < complete[0] else "costs" if after[1] < complete[1] else "files"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures as JSON; status 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--limit", type=int, default=14, help="samples of the built-in sweep (%(default)s)")
    parser.add_argument("--config", help="a sweep file in place of the built-in one")
    parser.add_argument("--output", default="runs/survive")
    parser.add_argument("--fork", action="store_true", help="fork processes that have imported everything: quick")
    args = parser.parse_args(argv)
    if args.fork:
        importlib.import_module("tokenprune.evals.sweep.sweep")
    root = Path(args.output)
    if (root / "calm").exists() or (root / "killed").exists():
        raise SystemExit(f"{root} holds an earlier trial; give another --output or remove it.")
    root.mkdir(parents=True, exist_ok=True)
    config = Path(args.config) if args.config else root / "sweep.yaml"
    if not args.config:
        config.write_text(json.dumps({**_SWEEP, "name": "survive", "limit": args.limit}))
    calm, killed = Sweep(config, root / "calm", args.fork), Sweep(config, root / "killed", args.fork)
    seen = undisturbed(calm)
    complete, seconds, first = calm.state(), seen[-1][0], seen[1][0]
    draw = random.Random(args.seed)
    # moments of the undisturbed sweep, in their order: after which state, and how long after
    moments = sorted(draw.uniform(0.0, seconds) for _ in range(args.kills))
    phases: Counter[str] = Counter()
    torn = 0
    for number, moment in enumerate(moments, start=1):
        since, state = max(entry for entry in seen[:-1] if entry[0] <= moment)
        early = draw.random() < 0.2  # a process that goes on may also die while it starts
        wait = draw.uniform(0.0, first) if early else moment - since
        before = killed.state()
        begin = time.perf_counter()
        process = killed.start()
        wait_for(killed, process, (0, 0) if early else state, wait)
        while not process.is_alive():  # it was quicker than the undisturbed one; a finished run can be killed, too
            begin = time.perf_counter()
            process = killed.start()
            process.join(draw.uniform(0.0, first))
        process.kill()
        process.join()
        lived, after = time.perf_counter() - begin, killed.state()
        rows = killed.folder / "samples.jsonl"
        torn += rows.exists() and not rows.read_bytes().endswith(b"\n") and rows.stat().st_size > 0
        phases[phase(before, after, complete, lived > first)] += 1
        done = f"rows {after[0]} of {complete[0]}, costs {after[1]} of {complete[1]}"
        print(f"kill {number}: after {lived:.1f} s, {done}", flush=True)
    last = killed.start()
    last.join()
    if last.exitcode:
        raise RuntimeError(f"The last process ended with status {last.exitcode}; see {killed.folder}.log.")
    equal = {
        "summary.csv": table(calm.folder) == table(killed.folder),
        "results.jsonl": records(calm.folder) == records(killed.folder),
        "samples.jsonl": answers(calm.folder) == answers(killed.folder),
    }
    again = killed.asked_rows() - killed.state()[0]
    figures = {
        "kills": args.kills, "phases": dict(phases), "torn_lines": torn, "rows": complete[0],
        "batch_size": _batch(config),
        "asked_undisturbed": calm.asked_rows(), "asked_killed": killed.asked_rows(), "asked_again": again,
        "seconds_undisturbed": round(seconds, 1), "equal": equal,
    }  # fmt: skip
    text = json.dumps(figures, indent=1)
    (root / "figures.json").write_text(text + "\n")
    print(text)
    return 0 if all(equal.values()) else 1


def _batch(config: Path) -> int:
    from tokenprune.plan.expression import read_yaml

    return int(read_yaml(config).get("batch_size") or 8)


if __name__ == "__main__":
    sys.exit(main())
