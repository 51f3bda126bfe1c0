"""The crowd suites: more salient objects than any small budget holds, of which a question names one or two.

Why they exist. On the scenes of the other suites a cut to 64 of 576 tokens still holds every object, so a method that
keeps what stands out, or what differs, does not need to know the question. Here 16 to 20 objects stand in a scene, all
alike in salience and all different, and 16 tokens hold three or four of them: saliency and diversity alone must miss
what is asked, and an oracle must not. `exist` and `relation` are asked because they name their objects; both are
answered in equal shares.

Why they are tasks of their own, `pocket-crowd` and `pocket-mixed-crowd`, beside `pocket` and `pocket-mixed`: a family
more in those would change every number that anybody has measured on them, and its mean would mix two questions, what a
method keeps of a scene and whether it heard what was asked. They are a test split only. No model was trained on so many
objects, so what is measured is not what was learned here, and nothing may be tuned on it.

``python -m tokenprune.evals.pocket.crowd`` draws the committed files anew.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from tokenprune.evals.pocket import questions
from tokenprune.evals.pocket.catalog import suite_file
from tokenprune.evals.pocket.mixed_suite import draw_files, grown, row_of, write_rows
from tokenprune.evals.pocket.questions import SIDES, Question
from tokenprune.evals.pocket.scenes import PATCH, SPLIT_SEED, Scene, make_scene
from tokenprune.evals.pocket.suite import png


@dataclass(frozen=True)
class Crowd:
    """How a crowd suite is drawn.

    Attributes:
        sizes: columns and rows of patches of its scenes, by turns.
        objects: fewest and most objects in a scene.
        scale: how many times larger its pictures are than its scenes.
        scenes: how many; two questions about each.
        seed: of the first scene, within the range of the test split: scenes that no other suite draws.
    """

    sizes: tuple[tuple[int, int], ...]
    objects: tuple[int, int]
    scale: int
    scenes: int
    seed: int


CROWDS = {
    "pocket-crowd": Crowd(((24, 24),), (16, 20), 1, 160, 700_000_000),
    "pocket-mixed-crowd": Crowd(
        ((20, 14), (14, 20), (18, 16), (16, 18), (18, 18), (20, 20), (24, 16), (16, 24)), (16, 20), 2, 160, 800_000_000
    ),
}


def load_rows(suite: str) -> list[dict]:
    """The test split of a crowd suite; ``image`` as PNG bytes, ``boxes`` in fractions of the width and height."""
    return pq.read_table(suite_file(suite)).to_pylist()


def draw_rows(suite: str, scenes: int | None = None) -> list[dict]:
    """The rows of `load_rows`, drawn; of the first ``scenes`` scenes only, if said.

    Rows go round the families and the answers, so that every prefix is as good as balanced.
    """
    crowd, rows = CROWDS[suite], []
    for i in range(crowd.scenes if scenes is None else scenes):
        seed = SPLIT_SEED["test"] + crowd.seed + i
        cols, lines = crowd.sizes[i % len(crowd.sizes)]
        scene = make_scene(seed, (cols * PATCH, lines * PATCH), crowd.objects, free_repeats=True)
        picture = png(grown(scene.image, crowd.scale))
        for question in ask_two(scene, i, random.Random(seed)):
            rows.append(row_of(f"crowd-{i:04d}", picture, question, scene.width, scene.height))
    return rows


def ask_two(scene: Scene, turn: int, rng: random.Random) -> list[Question]:
    """An `exist` and a `relation` question about a scene, whose answers depend on ``turn`` only."""
    # eight turns see every answer of one family with every answer of the other
    exist = questions.exist(scene, rng, (turn // len(SIDES)) % 2 == 0)
    relation = questions.relation(scene, rng, SIDES[turn % len(SIDES)])
    if relation is None:
        raise ValueError(f"Scene {scene.seed} has no two things that stand {SIDES[turn % len(SIDES)]} of each other.")
    return [exist, relation]


def build(suite: str, path: Path) -> None:
    """Draw a crowd suite and write it."""
    write_rows(draw_rows(suite), path)


def main() -> None:
    """Command line: draw both files."""
    draw_files(CROWDS, build, main.__doc__)


if __name__ == "__main__":
    main()
