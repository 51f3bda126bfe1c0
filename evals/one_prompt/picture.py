"""Pictures with a title: what the model saw, and beside it what a method kept of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

INK, SOFT, PAPER = "#16191d", "#626873", "#ffffff"
MARGIN, GAP, LEAST, MOST = 20, 20, 300, 900  # pixels; LEAST and MOST: width of a panel


@dataclass(frozen=True)
class Panel:
    """A picture with what stands over and under it."""

    title: str
    picture: Image.Image
    said: str = ""


def sheet(heading: str, panels: list[Panel]) -> Image.Image:
    """Panels side by side under a heading; one below the other where they are wide."""
    pictures = [_sized(panel.picture) for panel in panels]
    wide = max(picture.width for picture in pictures)
    below = wide > 560 and len(panels) > 1
    widths = [wide] if below else [picture.width for picture in pictures]
    inner = sum(widths) + GAP * (len(widths) - 1)
    head = _wrapped(heading, _font(17, bold=True), inner)
    texts = [
        (_wrapped(p.title, _font(15, bold=True), i.width), _wrapped(p.said, _font(15), i.width))
        for p, i in zip(panels, pictures)
    ]
    above = max(len(title) for title, _ in texts) * 21
    heights = [above + 6 + i.height + 8 + len(said) * 21 for i, (_, said) in zip(pictures, texts)]
    height = sum(heights) + GAP * (len(heights) - 1) if below else max(heights)
    top = MARGIN + len(head) * 24 + 10
    drawn = Image.new("RGB", (inner + 2 * MARGIN, top + height + MARGIN), PAPER)
    brush = ImageDraw.Draw(drawn)
    _write(brush, head, (MARGIN, MARGIN), _font(17, bold=True), 24)
    x, y = MARGIN, top
    for (title, said), picture, high in zip(texts, pictures, heights):
        _write(brush, title, (x, y + above - len(title) * 21), _font(15, bold=True), 21)
        drawn.paste(picture, (x, y + above + 6))
        _write(brush, said, (x, y + above + 6 + picture.height + 8), _font(15), 21, SOFT)
        x, y = (x, y + high + GAP) if below else (x + picture.width + GAP, y)
    return drawn


def _sized(picture: Image.Image) -> Image.Image:
    """A small picture by a whole factor larger, so that its patches keep sharp edges; a very wide one smaller."""
    factor = -(-LEAST // picture.width)
    if factor > 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if picture.width > MOST:
        return picture.resize((MOST, round(picture.height * MOST / picture.width)), Image.Resampling.LANCZOS)
    return picture


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib  # brings a font with most scripts' letters, wherever it is installed

    name = f"DejaVuSans{'-Bold' * bold}.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels; a word that is longer is broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = lines[-1] or word
        while font.getlength(lines[-1]) > width:
            cut = next(n for n in range(len(lines[-1]) - 1, 0, -1) if n == 1 or font.getlength(lines[-1][:n]) <= width)
            lines[-1:] = [lines[-1][:cut], lines[-1][cut:]]
    return [line for line in lines if line]


def _write(
    brush: ImageDraw.ImageDraw, lines: list[str], at: tuple[int, int], font: ImageFont.FreeTypeFont, step: int,
    ink: str = INK,
) -> None:  # fmt: skip
    for number, line in enumerate(lines):
        brush.text((at[0], at[1] + number * step), line, font=font, fill=ink)
