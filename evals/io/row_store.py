"""Rows on disk that survive a kill: one JSON object a line, appended and flushed as they finish."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Generic

from tokenprune.evals.errors import UserError
from tokenprune.evals.io.atomic_files import DiskRefuses
from tokenprune.evals.io.rows import Row


class RowStore(Generic[Row]):
    """A JSON-lines file that is only ever appended to, and what other writers of the same folder have left.

    A row counts once it ends in a newline; a torn last line, from a process killed in mid-write, is cut off when the
    file is opened. A row with the field `error` says that the work behind it failed: it does not count as done,
    and the next row with its key takes its place. A finished row stays, and no second one with its key is written.

    Args:
        path: the file that this process appends to.
        key: names of the fields that identify a row.
        shared: other files with rows of the same kind, which other processes write or wrote; only read.

    Raises:
        ValueError: a line other than the last is no JSON object.
    """

    def __init__(self, path: Path, key: tuple[str, ...], shared: Iterable[Path] = ()) -> None:
        self.path = path
        self._key = key
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows: dict[tuple[Any, ...], Row] = {}
        self._cut_torn_line()
        self.read([path, *shared])

    def _cut_torn_line(self) -> None:
        if self.path.exists():
            data = self.path.read_bytes()
            end = data.rfind(b"\n") + 1
            if end < len(data):
                os.truncate(self.path, end)

    def read(self, paths: Iterable[Path]) -> None:
        """Take in the rows of these files, as far as they are whole: their writers may be at work."""
        for path in paths:
            data = path.read_bytes() if path.exists() else b""
            for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
                try:
                    row = json.loads(line)
                    self._take(row)
                except (ValueError, TypeError, KeyError):
                    raise UserError(
                        f"Line {number} of {path} is no JSON row. Remove that line, or the file, to run again."
                    ) from None

    def _take(self, row: Row) -> None:
        key = self._identify(row)
        if key not in self:
            self._rows[key] = row

    def _identify(self, row: Any) -> tuple[Any, ...]:
        return tuple(row[name] for name in self._key)

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        """Whether there is a finished row with that key."""
        return key in self._rows and "error" not in self._rows[key]

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: tuple[Any, ...]) -> Row | None:
        """The row with that key, finished or failed."""
        return self._rows.get(key)

    def rows(self) -> Iterable[Row]:
        """Every row, in the order read and written."""
        return self._rows.values()

    def append(self, rows: list[Row]) -> None:
        """Write rows and wait until the disk has them; keys that are finished already are skipped, and so are failures
        that are known word for word.

        Raises:
            DiskRefuses: the disk is full, or broken. The file is then what it was before.
        """
        fresh: dict[tuple[Any, ...], Row] = {}
        for row in rows:
            key = self._identify(row)
            known = fresh.get(key) or self._rows.get(key)
            if known is None or ("error" in known and known != row):
                fresh[key] = row
        if not fresh:
            return
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in fresh.values()).encode()
        try:
            self._write(data)
        except OSError as error:
            raise DiskRefuses(self.path, error) from error
        self._rows.update(fresh)

    def _write(self, data: bytes) -> None:
        stream = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            before = os.fstat(stream).st_size
            try:
                # one call, so that a kill leaves all of a batch or, at worst, its first rows and a torn one
                written = os.write(stream, data)
                while written < len(data):
                    written += os.write(stream, data[written:])
                os.fsync(stream)
            except OSError:
                os.ftruncate(stream, before)
                raise
        finally:
            os.close(stream)


def row_files(folder: Path, kind: str) -> list[Path]:
    """The files with rows of a kind ("samples", "measures") in a run folder, of all its writers."""
    return sorted(folder.glob(f"{kind}.jsonl")) + sorted(folder.glob(f"{kind}.*.jsonl"))


def folder_store(folder: Path, kind: str, key: tuple[str, ...], writer: str = "") -> RowStore[Any]:
    """The rows of a kind in a run folder, appended to as `writer`.

    Every process of a run writes separate files (`samples.jsonl`, `samples.rank1.jsonl`, ...) and reads those of all,
    so that a run can be gone on with by another number of processes.
    """
    mine = folder / (f"{kind}.{writer}.jsonl" if writer else f"{kind}.jsonl")
    return RowStore(mine, key, [path for path in row_files(folder, kind) if path != mine])
