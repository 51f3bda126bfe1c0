"""Seeded, procedurally generated scenes: small coloured shapes and a sign on a patterned, cluttered background.

What matters is one to three patches wide (a patch is 14 pixels) and is not aligned to the patch grid, so most patches
of a scene are redundant and which ones matter depends on the question. All colours are flat: the pictures compress to a
few kilobytes. A scene is a pure function of ``(seed, size, objects, sign_share)``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

# Silhouettes that differ even at 20 pixels: squares and stars were tried, and cost a tiny tower most of its training.
SHAPES = ("circle", "bar", "triangle", "pole", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
PATTERNS = ("plain", "rows", "columns", "diagonals", "checks", "spots")
SYMBOLS = "ACEHJKLMPTUXY247"
SIGN_LENGTH = 3
PATCH = 14
SIZE = 336
# Splits are ranges of seeds, a billion apart, so no scene is ever in two of them.
SPLIT_SEED = {"test": 0, "val": 1_000_000_000, "train": 2_000_000_000}

_RGB = {
    "red": (216, 36, 36), "orange": (244, 140, 28), "yellow": (242, 222, 44), "green": (40, 160, 56),
    "cyan": (52, 206, 214), "blue": (40, 72, 216), "purple": (142, 52, 186), "pink": (246, 132, 196),
}  # fmt: skip
# Five by seven bitmaps, drawn at twice the size: 10 x 14 pixels a symbol.
_GLYPHS = {
    "A": "01110 10001 10001 11111 10001 10001 10001", "C": "01111 10000 10000 10000 10000 10000 01111",
    "E": "11111 10000 10000 11110 10000 10000 11111", "H": "10001 10001 10001 11111 10001 10001 10001",
    "J": "00111 00010 00010 00010 00010 10010 01100", "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111", "M": "10001 11011 10101 10101 10001 10001 10001",
    "P": "11110 10001 10001 11110 10000 10000 10000", "T": "11111 00100 00100 00100 00100 00100 00100",
    "U": "10001 10001 10001 10001 10001 10001 01110", "X": "10001 10001 01010 00100 01010 10001 10001",
    "Y": "10001 10001 01010 00100 00100 00100 00100", "2": "11110 00001 00001 01110 10000 10000 11111",
    "4": "00010 00110 01010 10010 11111 00010 00010", "7": "11111 00001 00010 00100 01000 01000 01000",
}  # fmt: skip
_BITMAPS = {
    symbol: np.kron(np.array([[int(bit) for bit in row] for row in rows.split()], bool), np.ones((2, 2), bool))
    for symbol, rows in _GLYPHS.items()
}
SIGN_PITCH, SIGN_MARGIN = 13, 4  # pixels from symbol to symbol, and from the plate's edge to the first symbol
_SIGN_SIZE = (2 * SIGN_MARGIN + (SIGN_LENGTH - 1) * SIGN_PITCH + 10, 2 * SIGN_MARGIN + 14)  # (width, height)


@dataclass(frozen=True)
class Thing:
    """One object; ``box`` is (x0, y0, x1, y1) in pixels, right and bottom edges exclusive."""

    shape: str
    colour: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass
class Scene:
    """A rendered scene.

    ``image`` is [height, width, 3] uint8. ``owner`` is [height, width] uint8: 0 background, 1 + i the i-th thing,
    200 + j the cell of the sign's j-th symbol, 250 the rest of the sign's plate.
    """

    seed: int
    width: int
    height: int
    pattern: str
    things: list[Thing]
    sign: str | None
    sign_box: tuple[int, int, int, int] | None
    image: np.ndarray = field(repr=False)
    owner: np.ndarray = field(repr=False)


def make_scene(
    seed: int,
    size: int | tuple[int, int] = SIZE,
    objects: tuple[int, int] = (5, 9),
    sign_share: float = 1.0,
    free_repeats: bool = False,
) -> Scene:
    """Draw the scene of ``seed``: between ``objects`` things (ends included), a sign in ``sign_share`` of scenes.

    ``size``: pixels a side, or (width, height). ``free_repeats``: any different (shape, colour) pairs, also where no
    shape or colour occurs once or one occurs more than five times; attribute and count questions need those limits,
    and many things do not fit them.
    """
    pick = _pick_freely if free_repeats else _pick_things
    rng = random.Random(seed)
    width, height = (size, size) if isinstance(size, int) else size
    pattern = rng.choice(PATTERNS)
    while True:
        wanted = pick(rng, rng.randint(*objects))
        text = "".join(rng.choices(SYMBOLS, k=SIGN_LENGTH)) if rng.random() < sign_share else None
        extents = [_extent(shape, rng.randint(20, 30)) for shape, _ in wanted]
        boxes = _place(rng, width, height, ([_SIGN_SIZE] if text else []) + extents)
        if boxes is not None:
            break
    background = _background(rng, pattern, width, height)
    sign_box = boxes.pop(0) if text else None
    things = [Thing(shape, colour, box) for (shape, colour), box in zip(wanted, boxes, strict=True)]
    pixels, owners = draw_things(background, things, [paint(rng, thing.colour) for thing in things])
    if text and sign_box:
        _draw_sign(pixels, owners, text, sign_box)
    return Scene(seed, width, height, pattern, things, text, sign_box, pixels, owners)


def paint(rng: random.Random, colour: str) -> tuple[int, ...]:
    """(red, green, blue) of a thing: no two things of one colour are painted quite alike."""
    return tuple(min(255, max(0, c + rng.randint(-10, 10))) for c in _RGB[colour])


def draw_things(
    background: np.ndarray, things: list[Thing], paints: list[tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray]:
    """``background`` [height, width, 3] with ``things`` on it, and whose each pixel is, [height, width] uint8."""
    image, owner = Image.fromarray(background), Image.new("L", background.shape[1::-1], 0)
    draw, mark = ImageDraw.Draw(image), ImageDraw.Draw(owner)
    for i, (thing, rgb) in enumerate(zip(things, paints, strict=True)):
        _draw_shape(draw, thing, rgb)
        _draw_shape(mark, thing, i + 1)
    return np.array(image), np.array(owner)


def _pick_things(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """``n`` different (shape, colour) pairs, in most scenes with one shape or colour repeated, so that counts vary."""
    while True:
        pairs: set[tuple[int, int]] = set()
        repeat, which = rng.randint(1, min(n, 5)), rng.randrange(2)
        fixed = rng.randrange(len(COLOURS) if which else len(SHAPES))
        for other in rng.sample(range(len(SHAPES) if which else len(COLOURS)), repeat):
            pairs.add((other, fixed) if which else (fixed, other))
        while len(pairs) < n:
            pair = rng.randrange(len(SHAPES)), rng.randrange(len(COLOURS))
            if pair[which] != fixed:
                pairs.add(pair)
        shapes, colours = [p[0] for p in pairs], [p[1] for p in pairs]
        # attribute questions need a shape or a colour that occurs once; count questions are about at most five
        if not any(shapes.count(s) == 1 for s in shapes) or max(map(shapes.count, shapes)) > 5:
            continue
        if not any(colours.count(c) == 1 for c in colours) or max(map(colours.count, colours)) > 5:
            continue
        return [(SHAPES[shape], COLOURS[colour]) for shape, colour in rng.sample(sorted(pairs), n)]


def _pick_freely(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """``n`` different (shape, colour) pairs."""
    return rng.sample([(shape, colour) for shape in SHAPES for colour in COLOURS], n)


def _extent(shape: str, side: int) -> tuple[int, int]:
    """(width, height) in pixels."""
    thin = round(0.4 * side)
    return (side, thin) if shape == "bar" else (thin, side) if shape == "pole" else (side, side)


def _place(rng: random.Random, across: int, down: int, extents: list[tuple[int, int]], gap: int = 5):
    """Non-overlapping boxes for ``extents`` (width, height), at any pixel; None if it does not fit."""
    boxes: list[tuple[int, int, int, int]] = []
    for width, height in extents:
        for _ in range(60):
            x, y = rng.randint(2, across - width - 2), rng.randint(2, down - height - 2)
            if all(
                x >= b[2] + gap or b[0] >= x + width + gap or y >= b[3] + gap or b[1] >= y + height + gap for b in boxes
            ):
                boxes.append((x, y, x + width, y + height))
                break
        else:
            return None
    return boxes


def _background(rng: random.Random, pattern: str, width: int, height: int) -> np.ndarray:
    """[height, width, 3] uint8: two muted tones in bands wider than a patch, with specks of a third tone."""
    grey = rng.randint(70, 185)
    base = [grey + rng.randint(-8, 8) for _ in range(3)]
    step, speck = rng.randint(22, 35) * rng.choice((-1, 1)), rng.randint(-60, 60)
    tones = np.clip([[c + d for c in base] for d in (0, step, speck)], 0, 255).astype(np.uint8)
    period, dx, dy = rng.randint(26, 48), rng.randrange(200), rng.randrange(200)
    line = np.arange(width + height)
    x, y = line[:width] + dx, line[:height] + dy
    across, down = (x // period % 2).astype(np.uint8)[None, :], (y // period % 2).astype(np.uint8)[:, None]
    index = np.zeros((height, width), np.uint8)
    if pattern == "rows":
        index |= down
    elif pattern == "columns":
        index |= across
    elif pattern == "checks":
        index = across ^ down
    elif pattern == "diagonals":
        bands = ((line + dx) // period % 2).astype(np.uint8)
        index = np.lib.stride_tricks.sliding_window_view(bands, width)[:height].copy()
    elif pattern == "spots":
        squares = [((v % period - period / 2) ** 2).astype(np.float32) for v in (x, y)]
        index = (squares[0][None, :] + squares[1][:, None] < (0.34 * period) ** 2).astype(np.uint8)
    for _ in range(int(rng.randint(20, 60) * (width * height / SIZE**2))):
        sx, sy, w, h = rng.randrange(width - 6), rng.randrange(height - 6), rng.randint(2, 5), rng.randint(2, 5)
        index[sy : sy + h, sx : sx + w] = 2
    return tones[index]


def _draw_shape(draw: ImageDraw.ImageDraw, thing: Thing, fill) -> None:
    x0, y0, x1, y1 = thing.box[0], thing.box[1], thing.box[2] - 1, thing.box[3] - 1
    side = x1 - x0
    if thing.shape == "circle":
        draw.ellipse((x0, y0, x1, y1), fill=fill)
    elif thing.shape in ("bar", "pole"):
        draw.rectangle((x0, y0, x1, y1), fill=fill)
    elif thing.shape == "triangle":
        draw.polygon([((x0 + x1) / 2, y0), (x1, y1), (x0, y1)], fill=fill)
    elif thing.shape == "cross":
        arm = side * 0.36
        draw.rectangle((x0 + arm, y0, x1 - arm, y1), fill=fill)
        draw.rectangle((x0, y0 + arm, x1, y1 - arm), fill=fill)
    else:
        draw.ellipse((x0, y0, x1, y1), outline=fill, width=max(4, side // 5))


def _draw_sign(pixels: np.ndarray, owners: np.ndarray, text: str, box: tuple[int, int, int, int]) -> None:
    """White plate, black rim and symbols; in place."""
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = 24
    pixels[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = 250
    owners[y0:y1, x0:x1] = 250
    for j, symbol in enumerate(text):
        x, y = x0 + SIGN_MARGIN + j * SIGN_PITCH, y0 + SIGN_MARGIN
        cell = pixels[y : y + 14, x : x + 10]
        cell[_BITMAPS[symbol]] = 16
        owners[y - 1 : y + 15, x - 1 : x + 11] = 200 + j
