"""Small pieces of HTML that the tables of the page are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tokenprune.evals.io.atomic_files import replace_file

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: HTML.
        value: what the column is sorted by; None sorts last.
        kind: its CSS class.
        title: what pointing at it says.
    """

    text: str = ""
    value: float | str | None = None
    kind: str = ""
    title: str = ""

    def html(self, group: str) -> str:
        """The `<td>`, in a group of columns."""
        value = "" if self.value is None else f"{self.value:.9g}" if isinstance(self.value, float) else str(self.value)
        title = f' title="{escape(self.title)}"' if self.title else ""
        return f'<td class="{group} {self.kind}" data-v="{escape(value)}"{title}>{self.text}</td>'


@dataclass(frozen=True)
class Column:
    """A column's heading, what it means, and the group that shows and hides with it ("" is always shown)."""

    head: str
    means: str = ""
    group: str = ""

    def html(self) -> str:
        """The `<th>`; a button inside, so that the keyboard reaches it."""
        title = f' title="{escape(self.means)}"' if self.means else ""
        return f'<th class="{self.group}" scope="col"{title}><button type="button">{escape(self.head)}</button></th>'


def table(columns: Sequence[Column], rows: Sequence[tuple[str, Sequence[Cell]]], kind: str = "") -> str:
    """A table that sorts when its headings are pressed.

    Args:
        rows: attributes of each `<tr>`, and its cells.
        kind: further CSS classes.
    """
    top = "".join(column.html() for column in columns)
    body = "\n".join(
        f"<tr{attributes}>{''.join(cell.html(column.group) for cell, column in zip(cells, columns, strict=True))}</tr>"
        for attributes, cells in rows
    )
    element = f'<table class="sort {kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{element}</div>'


def filled(file: str, parts: Mapping[str, str]) -> str:
    """A file of this folder with its `@@marks@@` filled; split first, so that nothing in a part is taken for one."""
    pieces = (HERE / file).read_text(encoding="utf-8").split("@@")
    return "".join(parts[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def write_framed(
    path: Path, title: str, notes: Sequence[str], links: Mapping[str, str], parts: Mapping[str, str]
) -> Path:
    """Write a page in the frame that all pages of ours have: one file that opens from disk.

    Args:
        title: of the page, first in the browser's tab.
        notes: sentences that a reader must know.
        links: text by what it leads to, in the bar that stays.
        parts: HTML of `lead`, `bar`, `main` and `origin`; `style`, `script`, and where there is any `data`.
    """
    head = {
        "data": "", "title": escape(title),
        "notes": "".join(f'<div class="note">{escape(note)}</div>' for note in notes),
        "links": "".join(f'<a data-to="{to}">{escape(text)}</a>' for to, text in links.items()),
    }  # fmt: skip
    return replace_file(path, filled("frame.html", {**head, **parts}))


def percent(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A fraction as percent; "" where there is none."""
    if value is None:
        return ""
    text = f"{100 * value:+.{digits}f}" if sign else f"{100 * value:.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def spread(low: float | None, high: float | None, sign: bool = False) -> str:
    """An interval of fractions as percent, in small print."""
    if low is None or high is None:
        return ""
    return f" <small>{percent(low, 0, sign)} to {percent(high, 0, sign)}</small>"


def number(value: float | None, form: str = ".3g") -> str:
    """A number; "" where there is none. Of a thousand and more the digits before the point, no power of ten."""
    if value is None:
        return ""
    return format(value, ",.0f") if form.endswith("g") and abs(value) >= 1000 else format(value, form)


def p_value(value: float | None) -> str:
    """A p-value to two digits, and never 0."""
    return "" if value is None else "&lt;.0001" if value < 0.0001 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"
