"""The hallucination suites: questions that tempt a model to see what is not there.

`random`, `popular` and `adversarial` are POPE's splits (arXiv 2305.10355): as many questions about a thing that is in
the scene as about one that is not. What is not there is drawn from all absent things, from those that are most frequent
in training scenes, or from those that most often stand in one training scene with the things that are there. Our
choices: one question of each answer for a scene and split; a popular thing is one of the ten most frequent of those
absent, an adversarial one is one of the three with the most company, which is the sum over the things of the scene of
how often the two stood together.

The generator draws every shape and colour alike, so nothing is popular in it: frequencies differ by sampling alone, and
`popular` is a second `random`. Company is real: scenes repeat a shape or a colour, so an adversarial thing shares both
with others of the scene. `statistics` has the numbers.

`listing` stands in for a caption, which the pocket models cannot write: they answer in a word or two and say "yes" or
"triangle" when asked to describe. For each colour and each shape of a scene it asks which thing has it, in the words
that they were trained on. An answer and its question name a thing; the things named in a scene are its caption, scored
as CHAIR does (arXiv 1809.02156) by the evaluations (`evals/tasks/hallucination_task.py`).

A test split only. ``python -m tokenprune.evals.pocket.hallucination`` draws the committed files anew.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

import pyarrow.parquet as pq

from tokenprune.evals.pocket import questions, scenes
from tokenprune.evals.pocket.catalog import suite_file
from tokenprune.evals.pocket.mixed_suite import SIZES, draw_files, grown, row_of, write_rows
from tokenprune.evals.pocket.questions import Question
from tokenprune.evals.pocket.scenes import COLOURS, PATCH, SHAPES, SPLIT_SEED, Scene, Thing, make_scene
from tokenprune.evals.pocket.suite import png

OBJECTS = (5, 9)
TRAINING_SCENES = 20_000
POPULAR, COMPANY = 10, 3
OR = " or "
"""Between the answers of a listing question that are right."""

Kind = tuple[str, str]
"""Shape and colour of a thing."""
KINDS: tuple[Kind, ...] = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)


@dataclass(frozen=True)
class Drawing:
    """How a suite is drawn.

    Attributes:
        sizes: columns and rows of patches of its scenes, by turns.
        scale: how many times larger its pictures are than its scenes.
        scenes: how many.
        seed: of the first scene, within the range of the test split: scenes that no other suite draws.
    """

    sizes: tuple[tuple[int, int], ...]
    scale: int
    scenes: int
    seed: int


DRAWINGS = {
    "pocket-hallucination": Drawing(((24, 24),), 1, 150, 900_000_000),
    "pocket-mixed-hallucination": Drawing(SIZES, 2, 150, 950_000_000),
}


@dataclass(frozen=True)
class Statistics:
    """What stands in the training scenes.

    Attributes:
        scenes: how many were counted.
        alone: scenes with a thing of each kind.
        together: scenes with both of two kinds, under either order.
    """

    scenes: int
    alone: Counter[Kind]
    together: Counter[tuple[Kind, Kind]]

    def company(self, kind: Kind, scene: set[Kind]) -> int:
        """How often a kind stood together with those of a scene."""
        return sum(self.together[kind, other] for other in scene)


@cache
def statistics(count: int = TRAINING_SCENES) -> Statistics:
    """Counted over the first scenes of the training split. Things that do not fit are drawn again by `make_scene`,
    which is rare and not followed here: no scene is rendered."""
    alone: Counter[Kind] = Counter()
    together: Counter[tuple[Kind, Kind]] = Counter()
    for i in range(count):
        kinds = first_things(SPLIT_SEED["train"] + i)
        alone.update(kinds)
        for one, other in combinations(kinds, 2):
            together[one, other] += 1
            together[other, one] += 1
    return Statistics(count, alone, together)


def first_things(seed: int) -> list[Kind]:
    """The things that `make_scene` tries first."""
    rng = random.Random(seed)
    rng.choice(scenes.PATTERNS)
    return scenes._pick_things(rng, rng.randint(*OBJECTS))


# --- questions --------------------------------------------------------------------------------------------------------


def absent_thing(split: str, present: set[Kind], rng: random.Random) -> Kind:
    """A kind that no thing of the scene is of, as the split draws it."""
    known, absent = statistics(), [kind for kind in KINDS if kind not in present]
    if split == "popular":
        absent = sorted(absent, key=lambda kind: -known.alone[kind])[:POPULAR]
    elif split == "adversarial":
        absent = sorted(absent, key=lambda kind: -known.company(kind, present))[:COMPANY]
    return rng.choice(absent)


def ask_about(scene: Scene, rng: random.Random) -> list[Question]:
    """Of each split a question with the answer yes and one with no, then a listing question for each colour and each
    shape of the scene."""
    present = {(thing.shape, thing.colour) for thing in scene.things}
    asked = []
    for split, thing in zip(("random", "popular", "adversarial"), rng.sample(scene.things, 3), strict=True):
        shape, colour = absent_thing(split, present, rng)
        asked.append(Question(split, questions.exist_text(thing.colour, thing.shape), "yes", _boxes([thing])))
        alike = [other for other in scene.things if other.shape == shape or other.colour == colour]
        asked.append(Question(split, questions.exist_text(colour, shape), "no", _boxes(alike or scene.things)))
    return asked + _listing(scene)


def _listing(scene: Scene) -> list[Question]:
    asked = []
    for colour in COLOURS:
        things = [thing for thing in scene.things if thing.colour == colour]
        if things:
            answer = OR.join(sorted({thing.shape for thing in things}))
            asked.append(Question("listing", f"what shape is the {colour} thing?", answer, _boxes(things)))
    for shape in SHAPES:
        things = [thing for thing in scene.things if thing.shape == shape]
        if things:
            answer = OR.join(sorted({thing.colour for thing in things}))
            asked.append(Question("listing", f"what colour is the {shape}?", answer, _boxes(things)))
    return asked


def _boxes(things: list[Thing]) -> tuple[questions.Box, ...]:
    return tuple(tuple(float(v) for v in thing.box) for thing in things)  # type: ignore[misc]


# --- rows -------------------------------------------------------------------------------------------------------------


def load_rows(suite: str) -> list[dict]:
    """The test split; ``image`` as PNG bytes, ``boxes`` in fractions of the width and height, ``things`` of the scene
    as "red circle"."""
    return pq.read_table(suite_file(suite)).to_pylist()


def draw_rows(suite: str, count: int | None = None) -> list[dict]:
    """The rows of `load_rows`, drawn; of the first ``count`` scenes only, if said."""
    drawing, rows = DRAWINGS[suite], []
    for i in range(drawing.scenes if count is None else count):
        seed = SPLIT_SEED["test"] + drawing.seed + i
        cols, lines = drawing.sizes[i % len(drawing.sizes)]
        scene = make_scene(seed, (cols * PATCH, lines * PATCH), OBJECTS)
        picture = png(grown(scene.image, drawing.scale))
        things = [f"{thing.colour} {thing.shape}" for thing in scene.things]
        for number, question in enumerate(ask_about(scene, random.Random(seed))):
            row = row_of(f"scene-{i:04d}", picture, question, scene.width, scene.height)
            rows.append({**row, "sample_id": f"{row['sample_id']}-{number:02d}", "things": things})
    return rows


def build(suite: str, path: Path) -> None:
    """Draw a suite and write it; equal pictures are stored once."""
    rows = draw_rows(suite)
    write_rows(rows, path, tuple(rows[0]))


def main() -> None:
    """Command line: draw both files, and say what the training scenes hold."""
    draw_files(DRAWINGS, build, main.__doc__)
    known = statistics()
    alone = [known.alone[kind] / known.scenes for kind in KINDS]
    print(f"{known.scenes} training scenes: a kind stands in {min(alone):.3f} to {max(alone):.3f} of them")
    for name, shares in _company_shares(known).items():
        print(f"a second kind stands there too, {name}: {min(shares):.3f} to {max(shares):.3f}")


def _company_shares(known: Statistics) -> dict[str, list[float]]:
    """By what two kinds share: how often the second stands in a scene that has the first."""
    shares: dict[str, list[float]] = {"same shape": [], "same colour": [], "neither": []}
    for one in KINDS:
        for other in KINDS:
            if one != other:
                name = "same shape" if one[0] == other[0] else "same colour" if one[1] == other[1] else "neither"
                shares[name].append(known.together[one, other] / known.alone[one])
    return shares


if __name__ == "__main__":
    main()
