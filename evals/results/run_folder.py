"""A finished run, read back from the files of its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

from tokenprune.evals.config.points import Point
from tokenprune.evals.io.atomic_files import read_lines
from tokenprune.evals.io.rows import SampleRow
from tokenprune.evals.results.records import Picture, Provenance, ResultRecord

PICTURES, PICTURE_INDEX = "pictures", "index.json"


@dataclass
class FinishedRun:
    """What a run folder holds.

    Attributes:
        folder: where it was read.
        records: one per point, see `summary.summarise`.
        rows: by point key, in the order of the samples; none for the points of the pooled task `all`.
        pictures: see `read_pictures`.
        origin: see `summary.provenance`.
    """

    folder: Path
    records: list[ResultRecord]
    rows: dict[str, list[SampleRow]]
    pictures: list[Picture]
    origin: Provenance

    @property
    def name(self) -> str:
        """What the run called itself."""
        return str(self.origin["config"]["name"])


def read_run(folder: str | Path) -> FinishedRun:
    """The run in `folder`.

    Raises:
        FileNotFoundError: it has no results.jsonl or samples.parquet; a run writes both when it ends.
        ValueError: its results.jsonl is empty.
    """
    import pyarrow.parquet as pq

    folder = Path(folder)
    for name in ("results.jsonl", "samples.parquet"):
        if not (folder / name).is_file():
            unfinished = (folder / "samples.jsonl").is_file()
            hint = " The run has not ended; start it again, it goes on where it was." if unfinished else ""
            raise FileNotFoundError(f"{folder} holds no finished run: there is no {name} in it.{hint}")
    records = read_records(folder / "results.jsonl")
    origin = records[0].get("provenance") or {}
    for record in records:
        record.pop("provenance", None)
    rows: dict[str, list[SampleRow]] = {}
    for row in pq.read_table(folder / "samples.parquet").to_pylist():
        rows.setdefault(row["point"], []).append(row)
    return FinishedRun(folder, records, rows, read_pictures(folder), origin)


def read_records(path: Path) -> list[ResultRecord]:
    """The records of a results.jsonl, each with its provenance.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}; give the folder of a finished run.")
    records = cast(list[ResultRecord], read_lines(path))
    if not records:
        raise ValueError(f"{path} holds no result.")
    return records


def point_of(record: ResultRecord) -> Point:
    """The point that a record is of."""
    known = {field.name: record[field.name] for field in fields(Point) if field.name in record}
    return Point(**{**known, "options": tuple(sorted(record["options"].items()))})


def read_pictures(folder: Path) -> list[Picture]:
    """The index of a run folder; [] where there is none."""
    index = folder / PICTURES / PICTURE_INDEX
    return json.loads(index.read_text(encoding="utf-8")) if index.is_file() else []
