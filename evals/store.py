"""Rows on disk that survive a kill: one JSON object a line, appended and flushed as they finish."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class RowStore:
    """A JSON-lines file that is only ever appended to.

    A row counts once it ends in a newline; a torn last line, from a process killed in mid-write, is cut off when the
    file is opened. Rows with a key that is there already are not written twice.

    Args:
        path: the file; made if missing.
        key: names of the fields that identify a row.

    Raises:
        ValueError: a line other than the last is no JSON object.
    """

    def __init__(self, path: Path, key: tuple[str, ...]) -> None:
        self.path = path
        self._key = key
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                raise ValueError(
                    f"Line {number} of {self.path} is no JSON. Remove that line, or the file, to run again."
                ) from None
            self._rows[self._identify(row)] = row

    def _identify(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self._key)

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: tuple[Any, ...]) -> dict[str, Any] | None:
        """The row with that key."""
        return self._rows.get(key)

    def rows(self) -> Iterable[dict[str, Any]]:
        """Every row, in the order written."""
        return self._rows.values()

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Write rows and wait until the disk has them; keys that are there already are skipped."""
        fresh = [row for row in rows if self._identify(row) not in self._rows]
        if not fresh:
            return
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in fresh)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        for row in fresh:
            self._rows[self._identify(row)] = row
