"""From the rows of one point to its scores: accuracy with its interval, and every comparison on the same samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from tokenprune.evals.config.grid import matching_reference
from tokenprune.evals.config.points import NONE, Point
from tokenprune.evals.io.rows import AnsweredRow, SampleRow
from tokenprune.evals.results.records import ResultRecord, Scores
from tokenprune.evals.statistics.bootstrap import bootstrap_mean, headroom_share
from tokenprune.evals.statistics.significance import compare_paired, holm

Rows = Sequence[SampleRow]

COMPARED = ("unpruned", "random")
"""What every point is tested against: the unpruned model, and `random` at the same budget."""


@dataclass(frozen=True)
class References:
    """Rows that a point is compared with; None where that point is not in the run, or is the point itself.

    Attributes:
        unpruned: of the same model and task.
        random, downsample, oracle: of the same model, task and budget, without options.
        itself: the point is the unpruned model.
    """

    unpruned: Rows | None = None
    random: Rows | None = None
    downsample: Rows | None = None
    oracle: Rows | None = None
    itself: bool = False

    @classmethod
    def of(cls, point: Point, points: Sequence[Point], rows: Mapping[str, Rows]) -> References:
        """Those of `point` among `points`, whose `rows` are given by key."""
        if point.method == NONE:
            return cls(itself=True)
        others = {name: matching_reference(point, points, name) for name in ("random", "downsample", "oracle")}
        compared = {name: rows.get(other.key) for name, other in others.items() if other is not None}
        unpruned = rows.get(Point(point.model, point.task, NONE, None).key)
        return cls(unpruned, compared.get("random"), compared.get("downsample"), compared.get("oracle"))

    def only(self, family: str) -> References:
        """The rows of one question family."""
        kept = {name: rows for name, rows in vars(self).items() if rows is not None and name != "itself"}
        return replace(self, **{name: of_family(rows, family) for name, rows in kept.items()})


def of_family(rows: Rows, family: str) -> list[SampleRow]:
    """The rows whose question is of `family`."""
    return [row for row in rows if row["family"] == family]


def answered(rows: Rows) -> list[AnsweredRow]:
    """The rows that count: those with an answer. A sample that failed has an `error`; a row that the run does not count
    (`counted` is false: the sample failed at another point) is in no statistic either."""
    return [cast(AnsweredRow, row) for row in rows if not row.get("error") and row.get("counted", True)]


def paired(first: Rows, *others: Rows) -> tuple[list[float], ...]:
    """Scores over the samples that all of them answered, in the order of `first`."""
    scores = [{row["sample_id"]: float(row["correct"]) for row in answered(rows)} for rows in (first, *others)]
    ids = [name for name in scores[0] if all(name in other for other in scores[1:])]
    return tuple([by_id[name] for name in ids] for by_id in scores)


def scores_of(rows: Rows, references: References, seed: int) -> Scores:
    """Accuracy and comparisons of one point, or of one family of it; what cannot be said is None.

    `vs_X_holm` is filled by `correct_for_many`. See `significance.Comparison` and `bootstrap.headroom_share`.
    """
    accuracy = bootstrap_mean([float(row["correct"]) for row in answered(rows)], seed)
    scores: dict[str, Any] = {
        "n": accuracy.n, "accuracy": accuracy.value, "ci_low": accuracy.low, "ci_high": accuracy.high, "relative": None,
    }  # fmt: skip
    if references.unpruned is not None:
        mine, theirs = map(sum, paired(rows, references.unpruned))
        scores["relative"] = mine / theirs if theirs else None
    elif references.itself and accuracy.value:
        scores["relative"] = 1.0
    for name in COMPARED:
        scores |= _against(f"vs_{name}", rows, getattr(references, name), seed)
    scores |= _discriminating(rows, references.downsample, seed) | _headroom(rows, references, seed)
    return cast(Scores, scores)


def _against(name: str, mine: Rows, baseline: Rows | None, seed: int) -> dict[str, Any]:
    parts = ("low", "high", "won", "lost", "p", "holm", "needed", "detectable")
    empty: dict[str, Any] = {name: None, **{f"{name}_{part}": None for part in parts}}
    if baseline is None:
        return empty
    scores, others = paired(mine, baseline)
    if not scores:
        return empty
    test = asdict(compare_paired(scores, others, seed))
    return empty | {name: test["difference"], **{f"{name}_{part}": test[part] for part in parts if part in test}}


def _discriminating(mine: Rows, downsample: Rows | None, seed: int) -> dict[str, Any]:
    accuracy: dict[str, Any] = dict.fromkeys(
        ("discriminating", "discriminating_low", "discriminating_high", "discriminating_n"),
    )
    if downsample is None:
        return accuracy
    scores, shrunk = paired(mine, downsample)
    hard = [score for score, other in zip(scores, shrunk, strict=True) if other < 0.5]
    accuracy["discriminating_n"] = len(hard)
    if hard:
        interval = bootstrap_mean(hard, seed)
        accuracy |= {
            "discriminating": interval.value, "discriminating_low": interval.low, "discriminating_high": interval.high,
        }  # fmt: skip
    return accuracy


def _headroom(mine: Rows, references: References, seed: int) -> dict[str, Any]:
    won: dict[str, Any] = dict.fromkeys(("headroom_won", "headroom_won_low", "headroom_won_high"))
    if references.random is None or references.oracle is None:
        return won
    scores = paired(mine, references.random, references.oracle)
    share = headroom_share(*scores, seed=seed) if scores[0] else None
    if share is not None:
        won |= {"headroom_won": share.value, "headroom_won_low": share.low, "headroom_won_high": share.high}
    return won


def correct_for_many(records: Sequence[ResultRecord]) -> None:
    """Fill `vs_X_holm` of each record's overall scores.

    A family of tests is all points of one model and task against one baseline: every method at every budget that the
    leaderboard shows, controls included. Question families are not corrected.
    """
    for name in COMPARED:
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for record in records:
            overall = cast(dict[str, Any], record["overall"])  # names of keys are put together here
            if overall[f"vs_{name}_p"] is not None:
                groups.setdefault((record["model"], record["task"]), []).append(overall)
        for group in groups.values():
            for scores, adjusted in zip(group, holm([scores[f"vs_{name}_p"] for scores in group]), strict=True):
                scores[f"vs_{name}_holm"] = adjusted
