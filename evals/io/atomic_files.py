"""Files that are written completely or not at all, and the error sentence for a full or broken disk."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tokenprune.evals.errors import UserError


class DiskRefuses(UserError):
    """The disk did not take what was to be written; what was finished before is whole."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"Could not write {path}: {error.strerror or error}. What was finished before is whole; "
            "make room and start the same command again, it goes on from there."
        )


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a path to write to; it takes the place of `path` when the block ends without an error.

    A reader sees the old file or the new one, and a kill leaves the old one.

    Raises:
        DiskRefuses: the file could not be written.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        raise DiskRefuses(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def replace_file(path: Path, text: str) -> Path:
    """Write a text file whole or not at all."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> Path:
    """Write a table whole or not at all; floats get nine digits, None and what a row lacks stay empty.

    Args:
        columns: in their order; by default those of the first row.
    """
    with replaced(path) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0] if columns is None else columns))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{cell:.9g}" if isinstance(cell, float) else cell for key, cell in row.items()})
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. Only a newline ends one: `splitlines` would cut a text at U+2028 or U+0085.

    Raises:
        ValueError: a line that is none; the message says which.
    """
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise ValueError(f"Line {number} of {path} is no JSON object. The file is not as it was written.")
        found.append(said)
    return found
