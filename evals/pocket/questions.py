"""Questions about a scene, their answers, and the boxes whose patches suffice to answer them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tokenprune.evals.pocket.scenes import COLOURS, SHAPES, SIZE, Scene, Thing

FAMILIES = ("exist", "attribute", "count", "relation", "read", "global")
LOCAL_FAMILIES = FAMILIES[:5]
SIDES = ("left", "right", "above", "below")
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Question:
    """``boxes``: (x0, y0, x1, y1) in pixels of the scene; the patches that they touch suffice for the answer."""

    family: str
    question: str
    answer: str
    boxes: tuple[Box, ...]


def ask(scene: Scene, family: str, rng: random.Random) -> Question | None:
    """A random question of ``family``; None if the scene allows none (no sign to read, for example)."""
    if family not in _ASK:
        raise ValueError(f"There is no question family {family!r}; the families are {', '.join(FAMILIES)}.")
    return _ASK[family](scene, rng)


def side_of(a: Thing, b: Thing) -> str | None:
    """Which side of ``b`` the thing ``a`` is on; None where neither axis clearly dominates (28 pixels, factor 1.8)."""
    dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
    if abs(dx) >= 28 and abs(dx) >= 1.8 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= 28 and abs(dy) >= 1.8 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def _boxes(things: list[Thing]) -> tuple[Box, ...]:
    return tuple(tuple(float(v) for v in thing.box) for thing in things)  # type: ignore[misc]


def _exist(scene: Scene, rng: random.Random) -> Question:
    return exist(scene, rng, rng.random() < 0.5)


def exist(scene: Scene, rng: random.Random, present: bool) -> Question:
    """Is there such a thing, answered yes or no as ``present`` says."""
    if present:
        thing = rng.choice(scene.things)
        return Question("exist", exist_text(thing.colour, thing.shape), "yes", _boxes([thing]))
    pairs = {(t.shape, t.colour) for t in scene.things}
    shapes, colours = {t.shape for t in scene.things}, {t.colour for t in scene.things}
    absent = [(s, c) for s in SHAPES for c in COLOURS if (s, c) not in pairs]
    # hard negatives: most often both the shape and the colour occur, only not on one object
    both = [(s, c) for s, c in absent if s in shapes and c in colours]
    shape, colour = rng.choice(both if both and rng.random() < 0.7 else absent)
    sharing = [t for t in scene.things if t.shape == shape or t.colour == colour]
    return Question("exist", exist_text(colour, shape), "no", _boxes(sharing or scene.things))


def exist_text(colour: str, shape: str) -> str:
    """The words of an `exist` question."""
    return f"is there {'an' if colour == 'orange' else 'a'} {colour} {shape}?"


def _attribute(scene: Scene, rng: random.Random) -> Question | None:
    shapes, colours = [t.shape for t in scene.things], [t.colour for t in scene.things]
    by_shape = [t for t in scene.things if shapes.count(t.shape) == 1]
    by_colour = [t for t in scene.things if colours.count(t.colour) == 1]
    if by_shape and (rng.random() < 0.6 or not by_colour):
        thing = rng.choice(by_shape)
        return Question("attribute", f"what colour is the {thing.shape}?", thing.colour, _boxes([thing]))
    if not by_colour:
        return None
    thing = rng.choice(by_colour)
    return Question("attribute", f"what shape is the {thing.colour} thing?", thing.shape, _boxes([thing]))


def _count(scene: Scene, rng: random.Random) -> Question:
    # draw the number first, then a shape or colour that occurs so often: large counts would be rare otherwise
    by_number: dict[int, list[tuple[str, list[Thing]]]] = {}
    for shape in SHAPES:
        things = [t for t in scene.things if t.shape == shape]
        by_number.setdefault(len(things), []).append((PLURALS[shape], things))
    for colour in COLOURS:
        things = [t for t in scene.things if t.colour == colour]
        by_number.setdefault(len(things), []).append((f"{colour} things", things))
    numbers = sorted(by_number)
    number = rng.choices(numbers, [0.5 if n == 0 else 1.0 for n in numbers])[0]
    words, things = rng.choice(by_number[number])
    return Question("count", f"how many {words} are there?", str(number), _boxes(things or scene.things))


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    by_side = _pairs_by_side(scene)
    return relation(scene, rng, rng.choice(sorted(by_side))) if by_side else None


def relation(scene: Scene, rng: random.Random, side: str) -> Question | None:
    """On which side of one thing another is, answered ``side``; None if no two things stand so."""
    pairs = _pairs_by_side(scene).get(side)
    if pairs is None:
        return None
    a, b = rng.choice(pairs)
    text = f"which side of the {b.colour} {b.shape} is the {a.colour} {a.shape} on?"
    return Question("relation", text, side, _boxes([a, b]))


def _pairs_by_side(scene: Scene) -> dict[str, list[tuple[Thing, Thing]]]:
    """By side: the pairs (a, b) with a on that side of b."""
    by_side: dict[str, list[tuple[Thing, Thing]]] = {}
    for a in scene.things:
        for b in scene.things:
            side = side_of(a, b) if a is not b else None
            if side is not None:
                by_side.setdefault(side, []).append((a, b))
    return by_side


def _read(scene: Scene, rng: random.Random) -> Question | None:
    if scene.sign is None or scene.sign_box is None:
        return None
    box = tuple(float(v) for v in scene.sign_box)
    return Question("read", "what does the sign say?", scene.sign, (box,))  # type: ignore[arg-type]


def _global(scene: Scene, rng: random.Random) -> Question:
    whole_picture = (0.0, 0.0, float(scene.width), float(scene.height))
    return Question("global", "what is the background pattern?", scene.pattern, (whole_picture,))


_ASK = {
    "exist": _exist, "attribute": _attribute, "count": _count,
    "relation": _relation, "read": _read, "global": _global,
}  # fmt: skip
WHOLE_IMAGE: Box = (0.0, 0.0, float(SIZE), float(SIZE))
