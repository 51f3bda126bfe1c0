"""Who writes into a run folder: one process under each writer's name."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from tokenprune.evals.errors import UserError
from tokenprune.evals.io.atomic_files import DiskRefuses, replace_file


@contextmanager
def lock_folder(folder: Path, writer: str = "", wait: float = 0.0) -> Iterator[None]:
    """Hold the right to write to the files of `writer` in `folder`.

    The lock is the kernel's (flock), so that of a process that died, in whatever way, is free at once. Who has it is
    written to a file next to it, for the sentence that a second process gets.

    Args:
        writer: "" for the run itself, or the name of one of its processes, see `row_store.folder_store`.
        wait: seconds in which another process may let go.

    Raises:
        UserError: another process has it.
    """
    from filelock import FileLock, Timeout

    holder = holder_file(folder, writer)
    lock = FileLock(folder / holder.name.replace(".holder.json", ".lock"), timeout=wait)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder} is being written by {_describe(holder)}. Wait until it is done, or give another folder with "
            "--output."
        ) from None
    except OSError as error:
        raise DiskRefuses(holder, error) from error
    try:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        who = {"process": os.getpid(), "host": platform.node(), "since": now, "command": " ".join(sys.argv)}
        replace_file(holder, json.dumps(who) + "\n")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def holder_file(folder: Path, writer: str = "") -> Path:
    """The file that says who has the lock of `writer`; it exists while somebody has it, or after that process was
    killed."""
    return folder / (f"run.{writer}.holder.json" if writer else "run.holder.json")


def read_holder(path: Path) -> dict[str, object]:
    """Process, host, time and command of whoever has a lock; empty if nothing can be read."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _describe(path: Path) -> str:
    who = read_holder(path)
    if not who:
        return "another process"
    return f"process {who.get('process')} on {who.get('host')} since {who.get('since')} ({who.get('command')})"
