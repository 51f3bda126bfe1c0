"""What the sample explorer shows: questions and answers as text, and for some samples the picture and what was kept.

Answers are stored once per sample and referred to by number, kept tokens as bits, pictures once however many methods
are drawn over them: the page of a large run stays small enough to open.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tokenprune.evals.io.rows import SampleRow
from tokenprune.evals.results.records import ResultRecord, View
from tokenprune.evals.results.run_folder import PICTURE_INDEX, PICTURES, FinishedRun

Drawn = dict[str, Any]
"""What a script of the page draws, as JSON."""

MOST_PICTURES = 60
"""Samples of a page that get a picture."""
MOST_PICTURE_BYTES = 6_000_000
"""Bytes of all pictures of a page together."""
MOST_TEXT_BYTES = 5_000_000
"""Bytes of all questions and answers of a page together."""
LONGEST_TEXT = 300
"""Letters of a question or an answer that are shown."""


class Room:
    """What is left of the page's limits; one object for all panels of a page."""

    def __init__(self) -> None:
        self.pictures, self.picture_bytes, self.text_bytes = MOST_PICTURES, MOST_PICTURE_BYTES, MOST_TEXT_BYTES

    def picture(self, size: int) -> bool:
        """Take room for one sample's pictures of `size` bytes, if there is any."""
        if self.pictures < 1 or size > self.picture_bytes:
            return False
        self.pictures -= 1
        self.picture_bytes -= size
        return True

    def text(self, size: int) -> bool:
        """Take room for `size` bytes of text, if there is any."""
        if size > self.text_bytes:
            return False
        self.text_bytes -= size
        return True


def explorer(
    records: list[ResultRecord], rows: dict[str, list[SampleRow]], runs: Iterable[FinishedRun], room: Room
) -> Drawn:
    """Samples of one model and task.

    Returns:
        `labels` of the points; `samples`, each with `id`, `family`, `question`, `answer`, `said` (distinct answers,
        each [text, score]), `by` (per point the number of its answer, -1 where it has none), and where there is a
        picture `views` and `kept` (per point the bits of what was kept, base64, "" where all was); `left_out`, how many
        samples had no room. Samples with a picture come first for room, then those on which methods differ.
    """
    points = [record for record in records if record["point"] in rows]
    if not points:
        return {"labels": [], "samples": [], "left_out": 0}
    answers = [{row["sample_id"]: row for row in rows[record["point"]]} for record in points]
    order = list(dict.fromkeys(name for table in answers for name in table))
    model, task = points[0]["model"], points[0]["task"]
    pictures: dict[str, tuple[Path, list[View]]] = {}
    for run in runs:
        for entry in run.pictures:
            if (entry["model"], entry["task"]) == (model, task):
                pictures.setdefault(entry["sample_id"], (run.folder, entry["views"]))
    samples = {name: _sample(name, [table.get(name) for table in answers]) for name in order}
    ranked = sorted(order, key=lambda name: (name not in pictures, not _disagree(samples[name])))
    shown: set[str] = set()
    for name in ranked:
        sample = samples[name]
        if not room.text(len(json.dumps(sample))):
            continue
        shown.add(name)
        if name in pictures:
            sample |= _drawn(*pictures[name], [table.get(name) for table in answers], room)
    return {
        "labels": [record["label"] for record in points],
        "samples": [samples[name] for name in order if name in shown],
        "left_out": len(order) - len(shown),
    }


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def _sample(name: str, rows: list[SampleRow | None]) -> Drawn:
    first = next(row for row in rows if row is not None)
    said: dict[tuple[str, float | None], int] = {}
    by = []
    for row in rows:
        if row is None:
            by.append(-1)
            continue
        failed = row.get("error")
        text = f"failed: {failed}" if failed else (row["prediction"] or "").strip()
        entry = (_short(text), None if failed else row["correct"])
        by.append(said.setdefault(entry, len(said)))
    return {
        "id": name, "family": first["family"], "question": _short(first["question"]),
        "answer": _short(str(first["answer"])), "said": [list(entry) for entry in said], "by": by,
    }  # fmt: skip


def _disagree(sample: Drawn) -> bool:
    return len({score is not None and score >= 0.5 for _, score in sample["said"]}) > 1


def _drawn(folder: Path, views: list[View], rows: list[SampleRow | None], room: Room) -> Drawn:
    files = [(view, folder / PICTURES / view["file"]) for view in views]
    files = [(view, file) for view, file in files if file.is_file()]
    if not files or not room.picture(sum(file.stat().st_size for _, file in files)):
        return {}
    # the visuals of a prompt one after the other, where it has several (pictures, frames)
    sizes: dict[int, int] = {}
    for view in views:
        visual = view.get("visual", 0)
        sizes[visual] = max(sizes.get(visual, 0), view["start"] + view["rows"] * view["cols"])
    begins = {visual: sum(sizes[other] for other in sizes if other < visual) for visual in sizes}
    return {
        "views": [
            {
                **{name: view[name] for name in ("rows", "cols", "kind")},
                "start": begins[view.get("visual", 0)] + view["start"],
                "src": "data:image/jpeg;base64," + base64.b64encode(file.read_bytes()).decode(),
            }
            for view, file in files
        ],
        "kept": [_bits(row, sizes, begins) for row in rows],
    }


def _bits(row: SampleRow | None, sizes: dict[int, int], begins: dict[int, int]) -> str | None:
    """Kept indices of the visuals that are shown, as bits in base64; "" where all stayed, None if not recorded."""
    if row is None or row.get("kept") is None:
        return None
    if not row["kept"]:
        return ""
    shown = [row["kept"][visual] if visual < len(row["kept"]) else None for visual in begins]
    if any(kept is None or min(kept, default=0) < 0 for kept in shown):
        raise ValueError(
            f"What sample {row['sample_id']} of {row['point']} kept, by samples.parquet, is not of the pictures in "
            f"{PICTURES}/{PICTURE_INDEX}: these files are not of one run, or were edited."
        )
    bits = np.zeros(sum(sizes.values()), dtype=np.uint8)
    for visual, begin in begins.items():
        bits[[begin + index for index in row["kept"][visual] if index < sizes[visual]]] = 1
    return base64.b64encode(np.packbits(bits).tobytes()).decode()
