"""Tables of answers whose right setting is known, in a model's place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tokenprune.evals.config.points import Point
from tokenprune.evals.tuning.recommend.settings import RecommendConfig


class Table:
    """Answers by setting, known beforehand: `[samples]` scores of the unpruned model and of each setting."""

    def __init__(self, unpruned: np.ndarray, settings: dict[tuple[str, int], tuple[float, np.ndarray]]) -> None:
        self.pictures = [str(sample) for sample in range(len(unpruned))]
        self.made_of = {"table": "toy"}
        self._unpruned, self._settings = unpruned, settings
        self.asked: set[tuple[str, int]] = set()
        self.die_after: int | None = None

    def open(self) -> None: ...

    def settings(self) -> list[Point]:
        return [Point("toy", "toy", method, keep) for method, keep in self._settings]

    def cost(self, setting: Point) -> tuple[float, bool]:
        return self._settings[self._key(setting)][0], True

    def scores(self, settings: Sequence[Point | None], samples: Sequence[int], on_answers) -> list[list[float]]:
        found = []
        for setting in settings:
            key = ("none", 0) if setting is None else self._key(setting)
            row = self._unpruned if setting is None else self._settings[key][1]
            for sample in samples:
                if self.die_after is not None and len(self.asked) >= self.die_after:
                    raise SystemExit("killed")
                self.asked.add((f"{key}", sample))
            found.append(row[list(samples)].tolist())
            on_answers(len(samples), "none" if setting is None else setting.label, True)
        return found

    @staticmethod
    def _key(setting: Point) -> tuple[str, int]:
        return setting.method, int(setting.keep or 0)


def drawn(seed: int, samples: int, drops: dict[tuple[str, int], tuple[float, float, float]]) -> Table:
    """A table drawn at random: (cost, rate of lost answers, rate of won answers) by setting, of all samples."""
    rng = np.random.default_rng(seed)
    unpruned = np.zeros(samples)
    settings = {}
    kind = rng.random(samples)
    unpruned[kind < 0.8] = 1
    for key, (cost, lost, won) in drops.items():
        own = unpruned.copy()
        luck = rng.random(samples)
        own[(unpruned == 1) & (luck < lost / 0.8)] = 0
        own[(unpruned == 0) & (luck < won / 0.2)] = 1
        settings[key] = (cost, own)
    return Table(unpruned, settings)


def asked_for(tmp_path: Path, within: float, **more) -> RecommendConfig:
    return RecommendConfig("pocket-llava", "pocket", within, output=str(tmp_path / "out"), **more)


LADDER = {
    ("holov", 288): (0.9, 0.002, 0.002),
    ("holov", 96): (0.5, 0.004, 0.004),
    ("holov", 64): (0.4, 0.10, 0.01),
    ("holov", 32): (0.3, 0.40, 0.00),
    ("random", 288): (0.85, 0.08, 0.02),
    ("random", 96): (0.45, 0.25, 0.02),
    ("random", 32): (0.25, 0.50, 0.01),
    ("fastv", 96): (0.7, 0.004, 0.004),
}
