"""Short videos: a scene in which one or two things move at a steady pace, and what can be asked about it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np

from tokenprune.evals.pocket import scenes
from tokenprune.evals.pocket.questions import Question
from tokenprune.evals.pocket.scenes import Scene, Thing

# a scene is shown at twice the size that pocket-llava sees, so a merged token shows what a patch shows to pocket-llava
SCALE = 2
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass
class Clip:
    """A drawn clip.

    ``frames``: one scene a frame, which share everything but the places of what moves. ``ways``: by index of the moving
    things, one of `WAYS`; no two things move the same way.
    """

    frames: list[Scene]
    ways: dict[int, str]


def make_clip(seed: int, size: tuple[int, int], frames: int, objects: tuple[int, int] = (3, 6)) -> Clip:
    """Draw the clip of ``seed``, (width, height) pixels; a moving thing goes 3 or 4 pixels a frame."""
    rng = random.Random(seed)
    pattern = rng.choice(scenes.PATTERNS)
    while True:
        wanted = scenes._pick_things(rng, rng.randint(*objects))
        moving = rng.sample(range(len(wanted)), rng.randint(1, 2))
        ways = dict(zip(moving, rng.sample(list(WAYS), len(moving)), strict=True))
        pace, extents = rng.randint(3, 4), []
        travel = pace * (frames - 1)
        for i, (shape, _) in enumerate(wanted):
            width, height = scenes._extent(shape, rng.randint(20, 30))
            dx, dy = WAYS.get(ways.get(i, ""), (0, 0))
            extents.append((width + abs(dx) * travel, height + abs(dy) * travel))
        boxes = scenes._place(rng, *size, extents)
        if boxes is not None:
            break
    background = scenes._background(rng, pattern, *size)
    paints = [scenes.paint(rng, colour) for _, colour in wanted]
    drawn = []
    for at in range(frames):
        things = []
        for i, ((shape, colour), (x0, y0, x1, y1)) in enumerate(zip(wanted, boxes, strict=True)):
            dx, dy = WAYS.get(ways.get(i, ""), (0, 0))
            # the box of the whole path shrinks to where the thing is now
            back, ahead = pace * at, travel - pace * at
            x0, x1 = (
                x0 + (back if dx > 0 else ahead if dx < 0 else 0),
                x1 - (ahead if dx > 0 else back if dx < 0 else 0),
            )
            y0, y1 = (
                y0 + (back if dy > 0 else ahead if dy < 0 else 0),
                y1 - (ahead if dy > 0 else back if dy < 0 else 0),
            )
            things.append(Thing(shape, colour, (x0, y0, x1, y1)))
        pixels, owner = scenes.draw_things(background, things, paints)
        drawn.append(Scene(seed, *size, pattern, things, None, None, pixels, owner))
    return Clip(drawn, ways)


def ask_clip(clip: Clip, rng: random.Random) -> Question:
    """Which way a named thing moves, or the colour of what moves that way; its boxes are the things' whole paths."""
    index, way = rng.choice(sorted(clip.ways.items()))
    first, last = clip.frames[0].things[index], clip.frames[-1].things[index]
    path = tuple(float(f(a, b)) for f, a, b in zip((min, min, max, max), first.box, last.box))
    if rng.random() < 0.6:
        text, answer = f"which way does the {first.colour} {first.shape} move?", way
    else:
        text, answer = f"what colour is the thing that moves {way}?", first.colour
    return Question("video", text, answer, (path,))  # type: ignore[arg-type]


def still(scene: Scene) -> Clip:
    """A still picture, as the model sees it: two equal frames."""
    return Clip([scene, replace(scene)], {})


def stacked(clip: Clip) -> np.ndarray:
    """[frames, height, width, 3] uint8."""
    return np.stack([scene.image for scene in clip.frames])
