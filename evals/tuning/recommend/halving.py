"""Successive halving over settings, as an Optuna study that outlives a kill.

All settings answer a few samples, half of them go on to twice as many, and so on. Who goes on is decided from two
numbers, cost and drop: settings whose drop is surely too large leave at once, and of the rest the layers of the Pareto
front stay, the first layer first. So both cheap settings that may keep within the bound and dear ones that surely do go
on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from tokenprune.evals.config.points import Point

SMALLEST_RUNG = 16
"""Samples below which a rung says too little."""


def rungs(samples: int) -> list[int]:
    """Numbers of samples after which settings leave, the last one all of them."""
    sizes = [samples]
    while sizes[0] // 2 >= SMALLEST_RUNG:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def survivors(costs: Sequence[float], drops: Sequence[float], refuted: Sequence[bool], at_least: int) -> set[int]:
    """Who goes on: at most half of all (but `at_least`), none that is refuted, Pareto layer by layer; of a layer that
    does not fit, those with the smaller drops. Where all are refuted the one with the smallest drop goes on alone, so
    that there is a closest one to name."""
    wanted = max(math.ceil(len(costs) / 2), at_least)
    left = [i for i in range(len(costs)) if not refuted[i]]
    if not left:
        return {min(range(len(costs)), key=lambda i: (drops[i], costs[i]))}
    kept: list[int] = []
    while left and len(kept) < wanted:
        layer = pareto([(costs[i], drops[i]) for i in left])
        chosen = sorted((left[i] for i in layer), key=lambda i: (drops[i], costs[i]))
        kept += chosen[: wanted - len(kept)]
        left = [i for i in left if i not in chosen]
    return set(kept)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points of which none other is at most as large in both numbers and smaller in one; of equal
    points the first."""
    order = sorted(range(len(points)), key=lambda i: (*points[i], i))
    best, front = math.inf, []
    for i in order:
        if points[i][1] < best:
            front.append(i)
            best = points[i][1]
    return front


class _Halving(optuna.pruners.BasePruner):
    """Decides for all trials of a rung at once, after the last of them has reported."""

    def __init__(self, at_least: int) -> None:
        self._at_least = at_least
        self._going_on: dict[int, set[int]] = {}

    def prune(self, study: Any, trial: Any) -> bool:
        rung = trial.last_step
        if rung not in self._going_on:
            peers = [
                t
                for t in study.get_trials(deepcopy=False)
                if t.state != TrialState.FAIL and rung in t.intermediate_values
            ]
            # in an order that does not depend on where a run was killed
            peers.sort(key=lambda t: (t.user_attrs["cost"], t.params["setting"]))
            costs = [t.user_attrs["cost"] for t in peers]
            drops = [t.intermediate_values[rung] for t in peers]
            refuted = [t.user_attrs.get("refuted") == rung for t in peers]
            self._going_on[rung] = {peers[i].number for i in survivors(costs, drops, refuted, self._at_least)}
        return trial.number not in self._going_on[rung]


class Study:
    """The trials, one for each setting.

    Args:
        path: SQLite file; None keeps the study in memory.
        made_of: what decides the outcome; a study of anything else is not gone on with.
        at_least: settings that are never cut below by number alone.

    Raises:
        ValueError: the file is a study of something else.
    """

    def __init__(self, path: Path | None, made_of: dict[str, Any], at_least: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = None if path is None else f"sqlite:///{path}"
        self._study = optuna.create_study(
            storage=storage, study_name="recommend", load_if_exists=True, pruner=_Halving(at_least)
        )
        before = self._study.user_attrs.get("made_of", made_of)
        for name, value in made_of.items():
            if before.get(name) != value:
                change = f" ({before.get(name)!r}, now {value!r})"
                raise ValueError(
                    f"The study {path} was made with another {name}{change if len(change) < 80 else ''}; give another "
                    "--output."
                )
        self._study.set_user_attr("made_of", made_of)

    def begin(self, settings: Sequence[tuple[Point, float]]) -> dict[str, Any]:
        """Trials of the settings (with their costs) that are still to be decided, by the setting's key. What a kill
        left undecided begins anew, with the answers that were written down."""
        labels = [point.label for point, _ in settings]
        for trial in self._study.get_trials(states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)
        for _ in self._study.get_trials(states=(TrialState.WAITING,)):  # killed between the next two calls
            self._study.tell(self._study.ask(), state=TrialState.FAIL)
        decided = {t.params["setting"] for t in self._study.get_trials() if t.state in _DECIDED}
        space: dict[str, Any] = {"setting": optuna.distributions.CategoricalDistribution(labels)}
        waiting = {}
        for point, cost in settings:
            if point.label in decided:
                continue
            self._study.enqueue_trial({"setting": point.label}, skip_if_exists=False)
            trial = self._study.ask(space)
            trial.set_user_attr("cost", cost)
            waiting[point.key] = trial
        return waiting

    def leaves(self, trials: Sequence[Any], drops: Sequence[float], refuted: Sequence[bool], rung: int) -> list[bool]:
        """Tell the drop of each trial after `rung` samples; which of them leave."""
        for trial, drop, no in zip(trials, drops, refuted):
            if no:
                trial.set_user_attr("refuted", rung)
            trial.report(drop, rung)
        gone = [trial.should_prune() for trial in trials]
        for trial, out in zip(trials, gone):
            if out:
                self._study.tell(trial, state=TrialState.PRUNED)
        return gone

    @property
    def finished(self) -> set[str]:
        """Labels of the settings that went through all rungs."""
        return {t.params["setting"] for t in self._study.get_trials(states=(TrialState.COMPLETE,))}

    def history(self) -> list[dict[str, Any]]:
        """Of every decided setting: `setting`, `cost`, `samples` that it answered in the search, `drop` on them, and
        whether it `finished`; cheap ones first."""
        trials = [t for t in self._study.get_trials() if t.state in _DECIDED and t.intermediate_values]
        rows = [
            {
                "setting": t.params["setting"], "cost": t.user_attrs["cost"], "samples": max(t.intermediate_values),
                "drop": t.intermediate_values[max(t.intermediate_values)], "finished": t.state == TrialState.COMPLETE,
            }
            for t in trials
        ]  # fmt: skip
        return sorted(rows, key=lambda row: (row["cost"], row["setting"]))

    def finish(self, trial: Any, bound: float) -> None:
        """The trial went through all rungs, and this is its bound."""
        self._study.tell(trial, bound)


_DECIDED = (TrialState.COMPLETE, TrialState.PRUNED)
