"""A finished run, read back from the files of its folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from typing import Any, cast

from tokenprune.evals.config.points import Point
from tokenprune.evals.io.atomic_files import read_lines
from tokenprune.evals.io.rows import FLOPS_PARTS, FlopsCosts, KvCosts, Quartiles, SampleRow
from tokenprune.evals.io.shapes import ALTERED, check_shape
from tokenprune.evals.results.records import (
    AreaUnderCurve,
    EqualCost,
    Picture,
    Provenance,
    ResultRecord,
    Scores,
    View,
)
from tokenprune.interfaces.budget import budget_size

PICTURES, PICTURE_INDEX = "pictures", "index.json"
# what readers cannot do without; older files lack some of the rest
_RECORD = (
    "point", "model", "task", "method", "keep", "options", "label", "series", "overall", "families", "visual_tokens",
    "kept_tokens",
)  # fmt: skip
_ROW = ("point", "sample_id", "family", "question", "answer", "prediction", "correct")
_WHOLE = (Scores, KvCosts, FlopsCosts, Quartiles, EqualCost, AreaUnderCurve)
# numbers of `Scores` that are there together or not at all
_TOGETHER = [
    *([f"vs_{name}{part}" for part in ("", "_low", "_high", "_won", "_lost", "_p")] for name in ("unpruned", "random")),
    *([f"{name}{part}" for part in ("", "_low", "_high")] for name in ("discriminating", "headroom_won")),
]
_LARGEST = 2**24  # tokens of a picture; a raster of more is no picture's
_ORIGIN = {"config": ("name", "seed", "dtype", "limit"), "versions": ("torch", "transformers"),
           "hardware": ("cpu", "threads", "gpu")}  # fmt: skip


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
    origin = _read_origin(records[0], folder / "results.jsonl")
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
        ValueError: it is empty, or not as a run writes it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}; give the folder of a finished run.")
    records = cast(list[ResultRecord], read_lines(path))
    if not records:
        raise ValueError(f"{path} holds no result.")
    for number, record in enumerate(records, start=1):
        check_shape(record, ResultRecord, f"Record {number} of {path}", _RECORD, _WHOLE)
        inside = f"record {number} of {path}"
        for name, scores in {"overall": record["overall"], **record["families"]}.items():
            _check_together(cast(dict[str, Any], scores), f"{name} in {inside}")
        _check_budget(record["keep"], inside)
        if (flops := record.get("flops")) is not None:
            for name in ("analytic", "unpruned"):
                said = f"flops[{name!r}] in {inside}"
                check_shape(flops[name], dict[str, float | None], said, (*FLOPS_PARTS, "total"))
    return records


def _check_budget(keep: Any, where: str) -> None:
    try:
        if keep is not None:
            budget_size(keep)
    except ValueError:
        raise ValueError(f"keep in {where} is no budget, got {keep!r}. {ALTERED}") from None


def _check_together(scores: dict[str, Any], where: str) -> None:
    for names in _TOGETHER:
        there = [name for name in names if scores[name] is not None]
        if there and len(there) < len(names):
            gone = next(name for name in names if scores[name] is None)
            raise ValueError(f"{where} has {there[0]!r} without {gone!r}. {ALTERED}")


def _read_origin(record: ResultRecord, path: Path) -> Provenance:
    check_shape(record, dict[str, Any], f"Record 1 of {path}", ["provenance"])
    origin: Provenance = cast(dict[str, Any], record)["provenance"]
    check_shape(origin, Provenance, f"provenance in record 1 of {path}", whole=[Provenance])
    for name, needed in _ORIGIN.items():
        check_shape(origin[name], dict[str, Any], f"{name} of the provenance in record 1 of {path}", needed)
    return origin


def _read_rows(path: Path) -> list[SampleRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read: {why}. {ALTERED}") from None
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
        raise ValueError(f"{index} is no JSON. {ALTERED}") from None
    check_shape(pictures, list[Picture], str(index), whole=[Picture])
    for number, picture in enumerate(pictures):
        for view in picture["views"]:
            where = f"A view of entry {number} of {index}"
            check_shape(view, View, where, View.__required_keys__ - {"visual"})
            if PurePath(view["file"]).name != view["file"] or len(os.fsencode(view["file"])) > 255:
                raise ValueError(f"{where} names a file outside of {PICTURES}: {view['file']!r:.80}. {ALTERED}")
            rows, cols, start = view["rows"], view["cols"], view["start"]
            if min(rows, cols) < 1 or min(start, view.get("visual", 0)) < 0 or start + rows * cols > _LARGEST:
                raise ValueError(f"{where} has a raster that no picture has: {rows} x {cols} from {start}. {ALTERED}")
    return pictures
