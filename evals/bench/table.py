"""A CSV that grows row by row, each with hardware, versions, commit and date."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.results.summary import provenance

ORIGIN = ("cpu", "gpu", "threads", "torch", "transformers", "triton", "commit", "date")


def where() -> dict[str, Any]:
    """The columns `ORIGIN` of this machine and checkout."""
    origin = provenance(RunConfig(name="bench", model="", tasks=[], methods=[], keep=[]))
    hardware, versions = origin["hardware"], origin["versions"]
    machine = {"cpu": hardware["cpu"], "gpu": hardware["gpu"] or "", "threads": hardware["threads"]}
    machine |= {name: versions.get(name, "") for name in ("torch", "transformers", "triton")}
    return machine | {"commit": origin["commit"] or "", "date": origin["date"]}


class Table:
    """Writes a row as soon as it is measured, so that a bench that is cut off leaves what it had.

    Args:
        path: the file, made anew.
        columns: of a row, without `ORIGIN`.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path, self._columns, self._origin = path, (*columns, *ORIGIN), where()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, self._columns).writeheader()

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; floats get five digits, columns that it lacks stay empty."""
        short = {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()}
        with self.path.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, self._columns).writerow(short | self._origin)
