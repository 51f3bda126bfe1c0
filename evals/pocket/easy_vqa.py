"""The third-party family: images and questions of the PyPI package ``easy-vqa`` (Victor Zhou, MIT licence).

Needed only to train and to build the committed test split, never to load it.
"""

from __future__ import annotations

import random
import re
from functools import cache

import numpy as np
from PIL import Image

from tokenprune.evals.io.picture_reader import read_picture
from tokenprune.evals.pocket.questions import Question

EASY_SHAPES = ("circle", "rectangle", "triangle")
EASY_COLOURS = ("teal", "black", "green", "blue", "gray", "yellow", "red", "brown")


class EasyVQA:
    """One split: ``images`` [n, 64, 64, 3] uint8, per image its (question, answer) pairs, its shape and its colour.

    Shape and colour are read off the questions; -100 where none tells them.
    """

    def __init__(self, split: str) -> None:
        try:
            import easy_vqa
        except ImportError as error:
            raise ImportError(
                "Training and building the test split need the package easy-vqa: pip install easy-vqa"
            ) from error
        if split == "test":
            questions, paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
        elif split == "train":
            questions, paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
        else:
            raise ValueError(f"easy-vqa has the splits train and test, not {split!r}.")
        self.names = sorted(paths)
        self.images = np.stack([np.array(read_picture(paths[name])) for name in self.names])
        self.questions: list[list[tuple[str, str]]] = [[] for _ in self.names]
        place = {name: i for i, name in enumerate(self.names)}
        self.shape = np.full(len(self.names), -100, np.int64)
        self.colour = np.full(len(self.names), -100, np.int64)
        for question, answer, name in zip(*questions, strict=True):
            i = place[name]
            self.questions[i].append((question, answer))
            words = [answer] if answer not in ("yes", "no") else re.findall(r"\w+", question)
            if answer in ("yes", "no") and (answer == "no") != ("not" in words):
                continue  # says what the image does not show
            for word in words:
                if word in EASY_SHAPES:
                    self.shape[i] = EASY_SHAPES.index(word)
                elif word in EASY_COLOURS:
                    self.colour[i] = EASY_COLOURS.index(word)

    def image(self, i: int, size: int) -> np.ndarray:
        """[size, size, 3] uint8."""
        return np.array(Image.fromarray(self.images[i]).resize((size, size), Image.Resampling.BILINEAR))

    def ask(self, i: int, n: int, size: int, rng: random.Random) -> list[Question]:
        """Up to ``n`` questions about image ``i``, in random order; the whole image is their box."""
        whole_picture = ((0.0, 0.0, float(size), float(size)),)
        drawn = rng.sample(self.questions[i], min(n, len(self.questions[i])))
        return [Question("easy_vqa", question, answer, whole_picture) for question, answer in drawn]


@cache
def easy_split(split: str) -> EasyVQA:
    """The split "train" or "test", loaded once."""
    return EasyVQA(split)
