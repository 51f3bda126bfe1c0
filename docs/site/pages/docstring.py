"""Module docstrings of methods, interventions and families as Markdown."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from pages.formula import block

SOURCE = re.compile(
    r"(Papers?|Source|Official code|Licence|Published|Paper, official code and licence)(?=[:.])[:.] (.*)", re.DOTALL
)
HEADING = re.compile(r"([A-Z][^:.|]{3,70}):$")
ADDRESS = re.compile(r"\bhttps?://[^\s,;)]+[^\s,;.:)]")
ARXIV = re.compile(r"\barXiv (\d{4}\.\d{4,5}(?:v\d+)?)")
REPO = re.compile(r"\b((?!arXiv)[A-Za-z0-9-]{3,}/[A-Za-z0-9_.-]*[A-Za-z0-9])(?= at [0-9a-f]{7})")


@dataclass(frozen=True)
class Described:
    """A module docstring in parts.

    Attributes:
        does: its first line.
        sources: (what, text) of the lines on paper, code, licence and published numbers.
        how: the paragraphs up to the first heading, as Markdown.
        notes: (heading, Markdown) of what follows.
    """

    does: str
    sources: list[tuple[str, str]]
    how: str
    notes: list[tuple[str, str]]


def module_docstring(file: Path) -> str:
    """The docstring of a source file; nothing is imported."""
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def described(doc: str) -> Described:
    """A module docstring in parts."""
    does, _, rest = doc.partition("\n")
    sources: list[tuple[str, str]] = []
    how: list[str] = []
    notes: list[tuple[str, list[str]]] = []
    for paragraph in re.split(r"\n\s*\n", rest.strip("\n")):
        if SOURCE.match(paragraph):
            found, left = _sources(paragraph)
            sources += found
            paragraph = left
        if not paragraph.strip():
            continue
        lines = paragraph.split("\n")
        for heading, body in _split(lines):
            if heading:
                notes.append((heading, []))
            if body:
                (notes[-1][1] if notes else how).append(markdown(body))
    return Described(
        escaped(does), sources, "\n\n".join(how), [(heading, "\n\n".join(body)) for heading, body in notes]
    )


def _sources(paragraph: str) -> tuple[list[tuple[str, str]], str]:
    """Entries `Paper: ...` of a paragraph that begins with one, and what of it follows behind `Licence: ...`."""
    entries = re.split(
        r"\n(?=(?:Papers?|Source|Official code|Licence|Published|Deviations?|Evidence)(?: |:))", paragraph
    )
    found: list[tuple[str, str]] = []
    for number, entry in enumerate(entries):
        match = SOURCE.match(entry)
        if match is None:
            return found, "\n".join(entries[number:])
        found.append((match[1], escaped(" ".join(match[2].split()))))
    return found, ""


def _split(lines: list[str]) -> list[tuple[str, list[str]]]:
    """A paragraph cut at lines such as `Deviations:` that a list follows: (heading or "", lines)."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    for number, line in enumerate(lines):
        follows = lines[number + 1] if number + 1 < len(lines) else ""
        match = HEADING.match(line)
        alone = number == 0 or lines[number - 1].rstrip().endswith((".", ":", ")"))
        if match and follows.startswith(("- ", "| ")) and alone:
            parts.append((match[1], []))
        else:
            parts[-1][1].append(line)
    return [part for part in parts if part[0] or part[1]]


def markdown(lines: list[str]) -> str:
    """Lines of a docstring as Markdown: formulas, lists and tables keep their form, the rest is text."""
    if all(line.startswith("    ") for line in lines):
        return block([line.strip() for line in lines])
    out: list[str] = []
    for number, line in enumerate(lines):
        item = re.match(r"(- |\d+\. )", line)
        if item and number and not re.match(r"(- |\d+\. |  )", lines[number - 1]):
            out.append("")
        if out and number and not item and not line.startswith(" ") and re.match(r"(- |\d+\. )", _start(lines, number)):
            out.append("")  # a paragraph again, behind a list
        out.append(re.sub(r"^( {2,3})(?=\S)", "    ", escaped(line)))
    return "\n".join(out)


def _start(lines: list[str], number: int) -> str:
    """The line that begins the item which the line before `number` stands in."""
    place = number - 1
    while place > 0 and lines[place].startswith(" "):
        place -= 1
    return lines[place]


def escaped(text: str) -> str:
    """Text that is no Markdown: what would be taken for markup is escaped; addresses and arXiv numbers become links."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else _plain(piece) for piece in pieces)


def _plain(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("*", r"\*").replace("_", r"\_")
    text = re.sub(r"(?<=\w)\[(?=\w)", r"\\[", text)

    def address(match: re.Match[str]) -> str:
        where = match[0].replace(r"\_", "_")
        return f"[{where.removeprefix('https://')}]({where})"

    text = ADDRESS.sub(address, text)
    text = ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return REPO.sub(lambda match: f"[{match[1]}](https://github.com/{match[1].replace(chr(92), '')})", text)
