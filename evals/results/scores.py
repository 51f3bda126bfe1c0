"""From the rows of one point to its scores: accuracy with its interval, and every comparison on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tokenprune.evals.config.grid import matching_reference
from tokenprune.evals.config.points import NONE, Point
from tokenprune.evals.statistics.bootstrap import bootstrap_mean, headroom_share
from tokenprune.evals.statistics.significance import compare_paired, holm

Record = dict[str, Any]
Rows = list[Record]

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
    def of(cls, point: Point, points: Sequence[Point], rows: dict[str, Rows]) -> References:
        """Those of `point` among `points`, whose `rows` are given by key."""
        if point.method == NONE:
            return cls(itself=True)
        others = {name: matching_reference(point, points, name) for name in ("random", "downsample", "oracle")}
        found = {name: rows.get(other.key) for name, other in others.items() if other is not None}
        unpruned = rows.get(Point(point.model, point.task, NONE, None).key)
        return cls(unpruned, found.get("random"), found.get("downsample"), found.get("oracle"))

    def only(self, family: str) -> References:
        """The rows of one question family."""
        kept = {name: rows for name, rows in vars(self).items() if isinstance(rows, list)}
        return replace(self, **{name: of_family(rows, family) for name, rows in kept.items()})


def of_family(rows: Rows, family: str) -> Rows:
    """The rows whose question is of `family`."""
    return [row for row in rows if row["family"] == family]


def answered(rows: Rows) -> Rows:
    """The rows that count: those with an answer. A sample that failed has an `error`; a row that the run does not count
    (`counted` is false: the sample failed at another point) is in no statistic either."""
    return [row for row in rows if not row.get("error") and row.get("counted", True)]


def paired(first: Rows, *others: Rows) -> tuple[list[float], ...]:
    """Scores over the samples that all of them answered, in the order of `first`."""
    scores = [{row["sample_id"]: float(row["correct"]) for row in answered(rows)} for rows in (first, *others)]
    ids = [name for name in scores[0] if all(name in other for other in scores[1:])]
    return tuple([found[name] for name in ids] for found in scores)


def scores_of(own: Rows, references: References, seed: int) -> Record:
    """Accuracy and comparisons of one point, or of one family of it; what cannot be said is None.

    Keys: `n`, `accuracy`, `ci_low`, `ci_high`; `relative`, the share of the unpruned accuracy; per baseline of
    `COMPARED` `vs_X` with `_low`, `_high`, `_won`, `_lost`, `_p`, `_holm` (filled by `correct_for_many`), `_needed`,
    `_detectable` (see `significance.Comparison`); `discriminating` with `_low`, `_high`, `_n`, the accuracy on the
    samples that `downsample` at the same budget gets wrong; `headroom_won` with `_low`, `_high` (see
    `stats.headroom_share`).
    """
    accuracy = bootstrap_mean([float(row["correct"]) for row in answered(own)], seed)
    scores: Record = {
        "n": accuracy.n, "accuracy": accuracy.value, "ci_low": accuracy.low, "ci_high": accuracy.high, "relative": None,
    }  # fmt: skip
    if references.unpruned is not None:
        mine, theirs = map(sum, paired(own, references.unpruned))
        scores["relative"] = mine / theirs if theirs else None
    elif references.itself and accuracy.value:
        scores["relative"] = 1.0
    for name in COMPARED:
        scores |= _against(f"vs_{name}", own, getattr(references, name), seed)
    return scores | _discriminating(own, references.downsample, seed) | _headroom(own, references, seed)


def _against(name: str, own: Rows, baseline: Rows | None, seed: int) -> Record:
    parts = ("low", "high", "won", "lost", "p", "holm", "needed", "detectable")
    empty: Record = {name: None, **{f"{name}_{part}": None for part in parts}}
    if baseline is None:
        return empty
    scores, others = paired(own, baseline)
    if not scores:
        return empty
    found = asdict(compare_paired(scores, others, seed))
    return empty | {name: found["difference"], **{f"{name}_{part}": found[part] for part in parts if part in found}}


def _discriminating(own: Rows, downsample: Rows | None, seed: int) -> Record:
    found: Record = dict.fromkeys(
        ("discriminating", "discriminating_low", "discriminating_high", "discriminating_n"),
    )
    if downsample is None:
        return found
    scores, shrunk = paired(own, downsample)
    hard = [score for score, other in zip(scores, shrunk, strict=True) if other < 0.5]
    found["discriminating_n"] = len(hard)
    if hard:
        interval = bootstrap_mean(hard, seed)
        found |= {
            "discriminating": interval.value, "discriminating_low": interval.low, "discriminating_high": interval.high,
        }  # fmt: skip
    return found


def _headroom(own: Rows, references: References, seed: int) -> Record:
    found: Record = dict.fromkeys(("headroom_won", "headroom_won_low", "headroom_won_high"))
    if references.random is None or references.oracle is None:
        return found
    scores = paired(own, references.random, references.oracle)
    share = headroom_share(*scores, seed=seed) if scores[0] else None
    if share is not None:
        found |= {"headroom_won": share.value, "headroom_won_low": share.low, "headroom_won_high": share.high}
    return found


def correct_for_many(records: Sequence[Record]) -> None:
    """Fill `vs_X_holm` of each record's overall scores.

    A family of tests is all points of one model and task against one baseline: every method at every budget that the
    leaderboard shows, controls included. Question families are not corrected.
    """
    for name in COMPARED:
        groups: dict[tuple[str, str], list[Record]] = {}
        for record in records:
            if record["overall"][f"vs_{name}_p"] is not None:
                groups.setdefault((record["model"], record["task"]), []).append(record["overall"])
        for group in groups.values():
            for scores, adjusted in zip(group, holm([scores[f"vs_{name}_p"] for scores in group]), strict=True):
                scores[f"vs_{name}_holm"] = adjusted
