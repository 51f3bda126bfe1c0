"""What pruning and interventions do on the hallucination suites: cells of docs/bench/hallucination-*.csv."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pages.boards import accuracy, point_name
from pages.places import DOCS

FILE = re.compile(r"hallucination-(.+?)(?:-(\d{4}-\d{2}-\d{2}))?\.csv")
SPLITS = ("random", "popular", "adversarial")
LISTING = ("CHAIR_i %", "CHAIR_s %", "things found %")
PLUS = re.compile(r"\+(?![^(]*\))")
"""A plus sign between parts of a plan, not one inside the options of a part."""


def parts(plan: str) -> tuple[list[str], list[str]]:
    """The methods and interventions that a plan is of, as they are written, and their names: `holov+var(p=0.4)` is
    `holov` and `var(p=0.4)`, named `holov` and `var`."""
    written = PLUS.split(plan)
    return written, [part.partition("(")[0] for part in written]


@dataclass(frozen=True)
class Bench:
    """The run of one model.

    Attributes:
        model: its name.
        file: the CSV, a row a point and task.
    """

    model: str
    file: Path

    @cached_property
    def points(self) -> dict[tuple[str, str], dict[str, dict[str, str]]]:
        """Rows over all questions, by (plan, budget) and by what is asked: a split, or `listing`."""
        found: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
        with self.file.open(encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                if row["family"] == "overall" and ":" in row["task"]:
                    found.setdefault((point_name(row), row["keep"]), {})[row["task"].rpartition(":")[2]] = row
        return found

    def of(self, name: str) -> list[tuple[str, str]]:
        """Points to show of an intervention: the unpruned model, it alone, then each method without it and with it, in
        the order of the file; none where it was not run."""
        shown: list[tuple[str, str]] = []
        for plan, keep in self.points:
            written, names = parts(plan)
            if name not in names:
                continue
            rest = "+".join(part for part, called in zip(written, names, strict=True) if called != name) or "none"
            shown += [point for point in ((rest, keep), (plan, keep)) if point in self.points and point not in shown]
        return shown

    def table(self, name: str) -> str:
        """These points as a Markdown table; "" where there are none."""
        heads = [*(f"accuracy %, {split}" for split in SPLITS), *LISTING]
        lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
        shown = self.of(name)
        for plan, keep in shown:
            rows = self.points[plan, keep]
            cells = [accuracy(rows[split]) if split in rows else "" for split in SPLITS]
            listing = rows.get("listing", {})
            cells += [f"{float(said):.1f}" if (said := listing.get(f"metric:{one}")) else "" for one in LISTING]
            called = "unpruned" if plan == "none" else f"`{plan}@{keep}`" if keep else f"`{plan}`"
            lines.append(f"| {called} | {' | '.join(cells)} |")
        return "\n".join(lines) if shown else ""

    def alike(self, name: str) -> str:
        """A sentence where the intervention alone changed no answer of the splits; "" where it changed one."""
        counted = [
            row
            for plan, keep in self.of(name)
            if not keep and plan != "none"
            for split, row in self.points[plan, keep].items()
            if split in SPLITS
        ]
        if not counted or any(float(row[f"vs_unpruned_{way}"] or 1) for row in counted for way in ("won", "lost")):
            return ""
        return f"Alone it turned no answer of the {sum(int(row['n']) for row in counted)} from right to wrong or back."


def benches(folder: Path = DOCS / "bench") -> list[Bench]:
    """The newest run of each model, by the date in its name."""
    newest: dict[str, tuple[str, Path]] = {}
    for file in sorted(folder.glob("hallucination-*.csv")):
        match = FILE.fullmatch(file.name)
        if match and (match[2] or "") >= newest.get(match[1], ("", file))[0]:
            newest[match[1]] = (match[2] or "", file)
    return [Bench(model, file) for model, (_, file) in sorted(newest.items())]


def section(name: str, folder: Path = DOCS / "bench") -> list[str]:
    """What a page shows of an intervention, as lines of Markdown."""
    lines = ["## Our numbers", ""]
    found = [(bench, table) for bench in benches(folder) if (table := bench.table(name))]
    if not found:
        return [*lines, "It was not run on the [hallucination suites](../guides/hallucination.md) yet.", ""]
    lines += [
        "On the [hallucination suites](../guides/hallucination.md), where the columns are explained: yes-no questions in "
        "three splits, and a listing put together from answers, where less of CHAIR is better. Alone and over a method, "
        "each beside the same without it; intervals are 95 percent.", "",
    ]  # fmt: skip
    for bench, table in found:
        (plan, keep), *_ = bench.of(name)
        asked = next(iter(bench.points[plan, keep].values()))["n"]
        said = bench.alike(name)
        head = f"**{bench.model}**, {asked} questions of each ([CSV](../bench/{bench.file.name})). {said}"
        lines += [head.rstrip(), "", table, ""]
    return [*lines, "These are models of a few million parameters on drawn pictures: no word on a 7B model.", ""]
