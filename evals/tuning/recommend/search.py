"""Finds the cheapest setting whose accuracy drop is shown to be within a bound.

The samples are halved by picture. One half is searched on: successive halving, then the Pareto front of cost and drop.
The other half is not read until the front is decided; on it a few settings of the front are tested, from the safest to
the cheapest, each at 95 percent, up to the first that fails, and the last one within the bound is recommended. Because
the order was fixed beforehand and testing stops at the first failure, the chance that a recommended setting's true drop
is above the bound is at most 5 percent, however many settings were searched and tested (fixed-sequence testing).
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from tokenprune.evals.config.points import NONE, Point
from tokenprune.evals.errors import UserError, as_user_error
from tokenprune.evals.io.progress import waiting
from tokenprune.evals.statistics.drop_bounds import Answers, Drop, Pairs, exact_bound, samples_needed, smallest_sample
from tokenprune.evals.tuning.recommend.evaluator import Bench, ModelBench, split
from tokenprune.evals.tuning.recommend.progress import SearchProgress, answers_at_most
from tokenprune.evals.tuning.recommend.settings import RecommendConfig

_UNPRUNED = NONE  # what the unpruned model is called on the bar
_CERTAIN = 1.645  # standard errors by which a drop must be above the bound to be refuted in the search


@dataclass(frozen=True)
class Tried:
    """A setting on both halves.

    Attributes:
        cost: as a share of the unpruned model's.
        search: on the samples of the search; says nothing reliable once the setting was picked by it.
        held_out: on the held-out half; None where it was not tested.
    """

    setting: Point
    cost: float
    search: Drop
    held_out: Drop | None = None


@dataclass
class Recommendation:
    """What a search found.

    Attributes:
        chosen: the recommended setting; None where none is within the bound.
        tested: what was tested on the held-out half, in order.
        closest: the setting tested whose bound is smallest.
        needed: samples in all, both halves, on which a drop like that of `closest` would be shown to be within the
            bound four times out of five; None where no number would do.
        at_best: the bound that the held-out half gives where no answer is lost.
        accuracy: of the unpruned model on the held-out half.
        samples: of the search half and of the held-out half.
        settings: how many were searched.
        left_out: settings that were not, and why.
        history: see `Study.history`.
    """

    chosen: Tried | None
    tested: list[Tried]
    closest: Tried
    needed: int | None
    at_best: float
    accuracy: float
    samples: tuple[int, int]
    settings: int
    left_out: dict[str, str]
    history: list[dict[str, Any]]
    seconds: float
    made_of: dict[str, Any] = field(default_factory=dict)


def recommend(
    config: RecommendConfig, console: Console | None = None, bench: Bench | None = None, keep_study: bool = True
) -> Recommendation:
    """Search, test on the held-out half, and say what was found; `output.write` writes it down.

    Args:
        bench: what answers; the model and data of the config by default.
        keep_study: whether the study is a file, from which a killed search goes on.

    Raises:
        UserError: something that was asked for cannot be done, so few samples can show nothing, or the unpruned model
            has no more to lose than --max-drop allows.
    """
    console = console or Console()
    begin = time.perf_counter()
    with as_user_error():
        config.check()
        with waiting(console, f"Reading the samples of {config.data}"):
            asked = bench or ModelBench(config, console)
    search, held_out = split(asked.pictures, config.seed)
    at_best = _enough(config, len(asked.pictures), len(held_out))
    console.print(
        f"{len(search)} samples to search on, {len(held_out)} held out, no picture in both. With no answer lost at all "
        f"the held-out half shows a drop of at most {at_best:.2%} at 95 percent confidence."
    )
    with waiting(console, f"Loading {config.model}"):
        asked.open()
    with SearchProgress(console) as watch:
        return _found(config, asked, watch, (search, held_out), at_best, begin, keep_study)


def _found(
    config: RecommendConfig,
    asked: Bench,
    watch: SearchProgress,
    halves: tuple[list[int], list[int]],
    at_best: float,
    begin: float,
    keep_study: bool,
) -> Recommendation:
    """From a model that is ready to what was found, under one bar."""
    from tokenprune.evals.tuning.recommend.halving import Study, rungs

    search, held_out = halves
    with as_user_error():
        wanted = _wanted(config, asked)
    first = rungs(len(search))[0]
    ahead = answers_at_most(len(wanted), rungs(len(search)), 0, config.finalists, len(held_out))
    watch.begin("timing the unpruned model", ahead, costs=len(wanted))
    _answers(asked, [], search[:first], watch, 0)
    watch.say(watch.estimate())
    with as_user_error():
        settings, left_out = _settings(config, asked, wanted, watch, ahead - first)
    made_of = {
        **asked.made_of, "--max-drop": config.max_drop, "--cost": config.cost,
        "list of settings": [point.label for point, _ in settings],
    }  # fmt: skip
    if keep_study:
        config.results.mkdir(parents=True, exist_ok=True)
    with as_user_error():
        study = Study(config.results / "study.db" if keep_study else None, made_of, config.finalists)
    searched = _search(config, asked, study, settings, halves, begin, watch)
    tested = _confirm(config, asked, _sequence(searched, config), held_out, watch)
    closest = min(tested, key=lambda tried: _bound(tried))
    holding = [tried for tried in tested if _bound(tried) <= config.max_drop]
    needed = None if closest.held_out is None else samples_needed(closest.held_out, config.max_drop)
    (unpruned,) = asked.scores([None], held_out, lambda done, label, fresh: None)
    _check_unpruned(config, sum(unpruned) / len(unpruned))
    return Recommendation(
        chosen=holding[-1] if holding else None, tested=tested, closest=closest,
        needed=None if needed is None else 2 * needed, at_best=at_best, accuracy=sum(unpruned) / len(unpruned),
        samples=(len(search), len(held_out)), settings=len(settings), left_out=left_out, history=study.history(),
        seconds=time.perf_counter() - begin, made_of=made_of,
    )  # fmt: skip


def _enough(config: RecommendConfig, samples: int, held_out: int) -> float:
    """The best bound that the held-out half can give. Raises UserError where that is above the one asked for."""
    at_best = exact_bound(held_out, 0, 0) if held_out else 1.0
    if at_best > config.max_drop:
        least = "no number of samples shows a drop of exactly 0; raise --max-drop"
        if config.max_drop > 0:
            least = f"at least {2 * smallest_sample(config.max_drop)} are needed, or raise --max-drop"
        raise UserError(
            f"{samples} samples can at best show a drop within {at_best:.2%}, on the {held_out} that are held out, and "
            f"--max-drop is {config.max_drop:.2%}: {least}."
        )
    return at_best


def _check_unpruned(config: RecommendConfig, accuracy: float) -> None:
    """Raise UserError where the unpruned model has no more to lose than is allowed: then everything holds."""
    if accuracy <= config.max_drop:
        raise UserError(
            f"Unpruned, {accuracy:.2%} of the held-out samples are right, and --max-drop is {config.max_drop:.2%}: a "
            "setting that answers nothing right would be within it, so none is recommended. Look at the answers in "
            f"{config.results}: is the task asked and marked in a way that fits the model? Else lower --max-drop."
        )


def _wanted(config: RecommendConfig, bench: Bench) -> list[Point]:
    wanted = bench.settings()
    if config.trials is not None and config.trials < len(wanted):
        wanted = random.Random(config.seed).sample(wanted, config.trials)
    return wanted


def _settings(
    config: RecommendConfig, bench: Bench, wanted: Sequence[Point], watch: SearchProgress, ahead: int
) -> tuple[list[tuple[Point, float]], dict[str, str]]:
    """What is tried, with its cost, cheap first; and why the rest is not."""
    costed: list[tuple[Point, float]] = []
    left_out: dict[str, str] = {}
    watch.begin("taking costs", ahead)
    for number, point in enumerate(wanted):
        watch.cost_of(point.label)
        fresh = True
        try:
            cost, fresh = bench.cost(point)
        except (ValueError, TypeError) as error:
            if config.methods:
                raise
            left_out[point.label] = str(error)
            continue
        finally:
            watch.costs(number + 1, fresh)
        if cost >= 1:
            left_out[point.label] = f"costs {cost:.1%} of the unpruned model"
        else:
            costed.append((point, cost))
    if not costed:
        raise ValueError("No setting is cheaper than the unpruned model. " + "; ".join(left_out.values()))
    return sorted(costed, key=lambda pair: (pair[1], pair[0].label)), left_out


def _search(
    config: RecommendConfig,
    bench: Bench,
    study: Any,
    settings: Sequence[tuple[Point, float]],
    halves: tuple[Sequence[int], Sequence[int]],
    begin: float,
    watch: SearchProgress,
) -> list[Tried]:
    """The settings that went through the halving, each on all samples of the search that it answered."""
    from tokenprune.evals.tuning.recommend.halving import rungs

    trials = study.begin(settings)
    alive = [(point, cost) for point, cost in settings if point.key in trials]
    answered = 0
    samples, held_out = halves
    sizes = rungs(len(samples))
    for number, rung in enumerate(sizes):
        late = config.minutes is not None and time.perf_counter() - begin > 60 * config.minutes
        if not alive or (late and answered):
            break
        ahead = answers_at_most(len(alive), sizes[number:], answered, config.finalists, len(held_out))
        what = f"round {number + 1} of {len(sizes)}: {len(alive)} settings x {rung} samples"
        watch.begin(what, ahead - (0 if answered else rung))  # the first samples were answered unpruned to time them
        of_rung = _answers(bench, [point for point, _ in alive], samples[:rung], watch, answered, answered or rung)
        measured = [answers.pairs() for answers in of_rung]
        gone = study.leaves(
            [trials[point.key] for point, _ in alive],
            [pairs.value for pairs in measured],
            [_refuted(pairs, config.max_drop) for pairs in measured],
            rung,
        )
        answered = rung
        alive = [pair for pair, out in zip(alive, gone) if not out]
    complete = answered == len(samples) or not alive
    done = [pair for pair in settings if pair in alive or (complete and pair[0].label in study.finished)]
    on = samples if complete else samples[:answered]
    all_answers = _answers(bench, [point for point, _ in done], on, watch, len(on), len(on))
    drops = [answers.drop(config.seed) for answers in all_answers]
    if complete:
        for (point, _), drop in zip(done, drops):
            if point.label not in study.finished:
                study.finish(trials[point.key], drop.bound)
    return [Tried(point, cost, drop) for (point, cost), drop in zip(done, drops)]


def _answers(
    bench: Bench,
    settings: Sequence[Point],
    samples: Sequence[int],
    watch: SearchProgress,
    counted: int,
    unpruned_counted: int | None = None,
) -> list[Answers]:
    """Answers of settings beside the unpruned model's; `counted` of each (and of the unpruned model) were on the bar
    before."""
    watch.skip(_UNPRUNED, counted if unpruned_counted is None else unpruned_counted)
    for point in settings:
        watch.skip(point.label, counted)
    unpruned, *scores = bench.scores([None, *settings], samples, watch.answers)
    pictures = [bench.pictures[sample] for sample in samples]
    return [Answers(unpruned, of_point, pictures) for of_point in scores]


def _refuted(drop: Pairs, within: float) -> bool:
    """Whether a drop within the bound is out of the question. A heuristic of the search, not a claim."""
    rate = (drop.lost + drop.won + 1) / (drop.n + 1)
    return drop.value - _CERTAIN * (drop.design_effect * rate / drop.n) ** 0.5 > within


def _sequence(searched: Sequence[Tried], config: RecommendConfig) -> list[Tried]:
    """What is tested on the held-out half, from the safest to the cheapest, each cheaper than the one before it.

    Of the front's settings whose drop on the search half is within the bound (the safest where none is): the cheapest
    that held there, the next cheaper one, which may hold with fresh samples, and before them what is safer.
    """
    from tokenprune.evals.tuning.recommend.halving import pareto

    front = [searched[i] for i in reversed(pareto([(tried.cost, tried.search.bound) for tried in searched]))]
    able = [tried for tried in front if tried.search.value <= config.max_drop] or front[:1]
    within = [i for i, tried in enumerate(able) if tried.search.bound <= config.max_drop]
    stop = min(len(able), (within[-1] if within else 0) + 2)
    return able[max(0, stop - config.finalists) : stop]


def _confirm(
    config: RecommendConfig, bench: Bench, sequence: Sequence[Tried], held_out: Sequence[int], watch: SearchProgress
) -> list[Tried]:
    """Test one after the other on the held-out half, up to the first that fails. All are answered together, which is
    cheaper than it sounds: they share each run of the vision tower."""
    tested: list[Tried] = []
    watch.begin(f"testing {len(sequence)} settings on the held-out half", (len(sequence) + 1) * len(held_out))
    for tried, answers in zip(sequence, _answers(bench, [tried.setting for tried in sequence], held_out, watch, 0)):
        drop = answers.drop(config.seed)
        tested.append(Tried(tried.setting, tried.cost, tried.search, drop))
        if drop.bound > config.max_drop:
            break
    return tested


def _bound(tried: Tried) -> float:
    return 1.0 if tried.held_out is None else tried.held_out.bound
