"""The leaderboards in docs/leaderboards, and tables made of them. Every number shown is a cell of their CSV files."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from functools import cache

from pages.places import DOCS

CONTROLS = ("random", "uniform", "pool", "downsample")
REFERENCE = "oracle"


@dataclass(frozen=True)
class Board:
    """One leaderboard.

    Attributes:
        file: its name in docs/leaderboards, without an ending.
        title: what it is of.
    """

    file: str
    title: str

    @property
    def model(self) -> str:
        """The model's name."""
        return self.rows[0]["model"]

    @property
    def rows(self) -> list[dict[str, str]]:
        """All rows of the CSV: a point and family of questions each."""
        return _rows(self.file)

    @property
    def overall(self) -> list[dict[str, str]]:
        """Rows over all questions."""
        return [row for row in self.rows if row["family"] == "overall"]

    @property
    def unpruned(self) -> dict[str, str]:
        """The row of the unpruned model."""
        return next(row for row in self.overall if row["method"] == "none")

    @property
    def budgets(self) -> list[str]:
        """Budgets, the largest first."""
        return sorted({row["keep"] for row in self.overall if row["keep"]}, key=float, reverse=True)

    @property
    def defaults(self) -> list[dict]:
        """What is not told apart from the best at each budget."""
        text = (DOCS / "leaderboards" / f"{self.file}.defaults.json").read_text(encoding="utf-8")
        return next(iter(json.loads(text).values()))

    def of(self, method: str) -> list[dict[str, str]]:
        """Rows over all questions of a method, its options in turn, the largest budget first."""
        rows = [row for row in self.overall if row["method"] == method]
        return sorted(rows, key=lambda row: (row["options"], -float(row["keep"] or 0)))

    def at(self, label: str, keep: str) -> dict[str, str]:
        """The row of a point."""
        return next(row for row in self.overall if point_name(row) == label and row["keep"] == keep)


BOARDS = (
    Board("pocket-llava", "pocket-llava, a few objects a picture"),
    Board("pocket-llava-crowd", "pocket-llava, 16 to 20 objects a picture"),
    Board("pocket-qwen", "pocket-qwen, pictures and short videos"),
    Board("pocket-qwen-crowd", "pocket-qwen, 16 to 20 objects a picture"),
)


@cache
def _rows(file: str) -> list[dict[str, str]]:
    with (DOCS / "leaderboards" / f"{file}.csv").open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def point_name(row: dict[str, str]) -> str:
    """`method`, or `method(options)` as the leaderboards write it."""
    return f"{row['method']}({row['options']})" if row["options"] else row["method"]


def percent(value: str, digits: int = 1) -> str:
    """A share as a number of percent; "" where there is none."""
    return f"{100 * float(value):.{digits}f}" if value else ""


def accuracy(row: dict[str, str]) -> str:
    """Accuracy in percent with its interval."""
    return f"{percent(row['accuracy'])} ({percent(row['ci_low'], 0)} to {percent(row['ci_high'], 0)})"


def budget_words(keep: str, row: dict[str, str]) -> str:
    """A budget in words: tokens, or a share and what it came to."""
    if float(keep) >= 1:
        return f"{int(float(keep))} tokens"
    return f"{100 * float(keep):g} % ({float(row['visual_tokens']) * float(keep):.0f} tokens)"


def against(row: dict[str, str], other: str) -> str:
    """Difference to `random` or `unpruned` in points, with its interval; "" where it was not compared."""
    value = row[f"vs_{other}"]
    if not value:
        return ""
    low, high = row[f"vs_{other}_low"], row[f"vs_{other}_high"]
    return f"{100 * float(value):+.0f} ({100 * float(low):+.0f} to {100 * float(high):+.0f})"


def method_table(board: Board, method: str) -> str:
    """All points of a method on a board as a Markdown table; "" where it was not run there."""
    rows = board.of(method)
    if not rows:
        return ""
    timed = any(row["selection_to_unpruned_prefill"] for row in rows)
    heads = ["options"] * any(row["options"] for row in rows)
    heads += ["budget", "accuracy, %", "against random, points", "against unpruned, points", "FLOPs, %", "KV cache, %"]
    heads += ["selection, % of prefill", "prefill, % of unpruned"] * timed
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [f"`{row['options']}`" if row["options"] else ""] if heads[0] == "options" else []
        cells += [budget_words(row["keep"], row), accuracy(row), against(row, "random"), against(row, "unpruned")]
        cells += [percent(row["flops_share"], 0), percent(row["kv_share"], 0)]
        if timed:
            cells += [percent(row["selection_to_unpruned_prefill"]), percent(row["prefill_to_unpruned"], 0)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
