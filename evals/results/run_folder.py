"""A finished run, read back from the files of its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

from tokenprune.evals.config.points import Point
from tokenprune.evals.io.atomic_files import read_lines
from tokenprune.evals.io.rows import SampleRow
from tokenprune.evals.io.shapes import check_shape
from tokenprune.evals.results.records import Picture, Provenance, ResultRecord, Scores, View

PICTURES, PICTURE_INDEX = "pictures", "index.json"
# what readers cannot do without; older files lack some of the rest
_RECORD = (
    "point", "model", "task", "method", "keep", "options", "label", "series", "overall", "families", "visual_tokens",
    "kept_tokens",
)  # fmt: skip
_SCORES = ("n", "accuracy", "ci_low", "ci_high")
_ROW = ("point", "sample_id", "family", "question", "answer", "prediction", "correct")


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
        ValueError: its results.jsonl is empty, or one of its files is not as a run writes it.
    """
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
    for row in _read_rows(folder / "samples.parquet"):
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
    for number, record in enumerate(records, start=1):
        where = f"Record {number} of {path}"
        check_shape(record, ResultRecord, where, _RECORD)
        for name, scores in {"overall": record["overall"], **record["families"]}.items():
            check_shape(scores, Scores, f"{name} in {where[0].lower()}{where[1:]}", _SCORES)
    return records


def _read_rows(path: Path) -> list[SampleRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read: {why}. The file is not as it was written.") from None
    for number, row in enumerate(rows, start=1):
        check_shape(row, SampleRow, f"Row {number} of {path}", _ROW)
    return rows


def point_of(record: ResultRecord) -> Point:
    """The point that a record is of."""
    known = {field.name: record[field.name] for field in fields(Point) if field.name in record}
    return Point(**{**known, "options": tuple(sorted(record["options"].items()))})


def read_pictures(folder: Path) -> list[Picture]:
    """The index of a run folder; [] where there is none.

    Raises:
        ValueError: it is not as a run writes it.
    """
    index = folder / PICTURES / PICTURE_INDEX
    if not index.is_file():
        return []
    try:
        pictures = json.loads(index.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{index} is no JSON. The file is not as it was written.") from None
    check_shape(pictures, list[Picture], str(index))
    for number, picture in enumerate(pictures):
        check_shape(picture, Picture, f"Entry {number} of {index}", Picture.__required_keys__)
        for view in picture["views"]:
            check_shape(view, View, f"A view of entry {number} of {index}", View.__required_keys__ - {"visual"})
    return pictures
