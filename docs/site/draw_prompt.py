"""Draws the way of a prompt for docs/how_it_works.md: `python docs/site/draw_prompt.py docs/pictures`.

Two files, prompt-light.svg and prompt-dark.svg; the numbers are those of LLaVA-1.5: 576 visual tokens, 32 layers.
"""

from __future__ import annotations

import sys
from pathlib import Path

WIDTH, HEIGHT = 900, 500
THEMES = {
    "light": {"ground": "#ffffff", "ink": "#1f2328", "soft": "#59636e", "box": "#f3f5f9", "line": "#8b95a1",
              "visual": "#3f51b5", "gone": "#c9d0e3", "text": "#bf6b00", "cut": "#c62839"},
    "dark": {"ground": "#1e2129", "ink": "#e6e8ee", "soft": "#a3abba", "box": "#2a2f3c", "line": "#6d778a",
             "visual": "#8c9eff", "gone": "#414963", "text": "#ffb454", "cut": "#ff7b86"},
}  # fmt: skip
SIDE, GAP = 8, 3


def _text(x: float, y: float, words: str, fill: str, size: int = 14, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" fill="{fill}" font-size="{size}" text-anchor="{anchor}"{weight}>{words}</text>'


def _box(x: float, y: float, wide: float, high: float, theme: dict[str, str]) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" rx="8" fill="{theme["box"]}" stroke="{theme["line"]}"/>'
    )


def _arrow(x: float, y: float, u: float, v: float, theme: dict[str, str]) -> str:
    return f'<path d="M{x} {y}L{u} {v}" stroke="{theme["line"]}" stroke-width="2" marker-end="url(#tip)" fill="none"/>'


def _grid(x: float, y: float, kept: set[int], theme: dict[str, str], side: int = 8) -> str:
    squares = []
    for place in range(side * side):
        row, col = divmod(place, side)
        fill = theme["visual"] if place in kept else theme["gone"]
        squares.append(
            f'<rect x="{x + col * (SIDE + GAP)}" y="{y + row * (SIDE + GAP)}" width="{SIDE}" height="{SIDE}" rx="1.5" '
            f'fill="{fill}"/>'
        )
    return "".join(squares)


def _row(x: float, y: float, visual: int, text: int, theme: dict[str, str]) -> str:
    step = SIDE + GAP
    parts = [(theme["text"], 2), (theme["visual"], visual), (theme["text"], text)]
    squares, place = [], 0
    for fill, count in parts:
        for _ in range(count):
            squares.append(
                f'<rect x="{x + place * step}" y="{y}" width="{SIDE}" height="{SIDE + 6}" rx="1.5" fill="{fill}"/>'
            )
            place += 1
    return "".join(squares)


def _cut(x: float, y: float, name: str, what: str, theme: dict[str, str]) -> str:
    return (
        f'<path d="M{x} {y - 16}v28" stroke="{theme["cut"]}" stroke-width="2.5" stroke-dasharray="5 4"/>'
        + _text(x, y + 30, name, theme["cut"], 14, "middle", bold=True)
        + _text(x, y + 48, what, theme["soft"], 12, "middle")
    )


def svg(theme: dict[str, str]) -> str:
    """The picture in one set of colours."""
    ink, soft = theme["ink"], theme["soft"]
    all_cells, kept = set(range(64)), {9, 10, 12, 18, 19, 27, 28, 29, 35, 36, 44, 50, 53, 61}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif" role="img" '
        'aria-label="The way of a prompt through a vision-language model, and the four places where tokens can leave">',
        "<title>The way of a prompt, and the four places where visual tokens can leave</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{theme["line"]}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{theme["ground"]}"/>',
        # the upper row: picture, tower, projector
        _text(20, 34, "The picture", ink, 15, bold=True),
        _grid(24, 48, all_cells, theme),
        _text(20, 156, "24 x 24 patches", soft, 12),
        _arrow(122, 92, 238, 92, theme),
        _cut(180, 92, "pixels", "before the tower", theme),
        _box(246, 48, 250, 88, theme),
        _text(262, 74, "Vision tower", ink, 15, bold=True),
        _text(262, 95, "24 blocks; its attention and", soft, 12),
        _text(262, 111, "features are what most", soft, 12),
        _text(262, 127, "methods rank by", soft, 12),
        _cut(452, 92, "vision:L", "", theme),
        _text(452, 156, "inside the tower", soft, 12, "middle"),
        _arrow(496, 92, 560, 92, theme),
        _box(566, 60, 116, 64, theme),
        _text(624, 87, "Projector", ink, 15, "middle", bold=True),
        _text(624, 107, "to the text's width", soft, 12, "middle"),
        _arrow(682, 92, 730, 92, theme),
        _grid(742, 48, all_cells, theme),
        _text(738, 156, "576 visual tokens", soft, 12),
        # the middle row: the prompt
        _text(20, 210, "The prompt", ink, 15, bold=True),
        _row(24, 224, 60, 8, theme),
        _text(24, 262, "text", theme["text"], 12),
        _text(330, 262, "visual tokens take most of the places", theme["visual"], 12, "middle"),
        _text(690, 262, "the question", theme["text"], 12),
        f'<path d="M785 164C785 190 690 196 650 216" stroke="{theme["line"]}" stroke-width="2" fill="none" '
        'marker-end="url(#tip)"/>',
        f'<path d="M12 284h{WIDTH - 24}" stroke="{theme["cut"]}" stroke-width="2.5" stroke-dasharray="5 4"/>',
        _text(24, 306, "input", theme["cut"], 14, bold=True),
        _text(70, 306, "before the decoder: most methods cut here", soft, 12),
        _row(24, 318, 14, 8, theme),
        _text(300, 331, "64 stay: embeddings, positions and mask are cut by one index", soft, 12),
        # the lower row: the decoder
        _box(20, 352, 640, 84, theme),
        _text(36, 378, "Decoder", ink, 15, bold=True),
        _text(36, 399, "each layer is given the mask, the positions", soft, 12),
        _text(36, 415, "and the keys of the tokens that it holds", soft, 12),
        _row(318, 382, 14, 8, theme),
        _cut(596, 388, "layer:K", "", theme),
        _text(596, 454, "inside the decoder, by its attention", soft, 12, "middle"),
        _grid(760, 352, kept, theme),
        _arrow(660, 394, 742, 394, theme),
        _text(20, 470, "What leaves early saves all that follows. The KV cache holds what each layer held,", soft, 12),
        _text(20, 486, "so every decoded token is cheaper too.", soft, 12),
        _text(756, 456, "what is left of", soft, 12),
        _text(756, 472, "the picture", soft, 12),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def main() -> None:
    """Write both files."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/pictures")
    folder.mkdir(parents=True, exist_ok=True)
    for name, theme in THEMES.items():
        (folder / f"prompt-{name}.svg").write_text(svg(theme), encoding="utf-8")


if __name__ == "__main__":
    main()
