"""What a result holds: one record a point, as `results.jsonl` has them."""

from __future__ import annotations

from typing import Any, TypedDict

from tokenprune.evals.io.rows import Costs

TableRow = dict[str, Any]
"""A row of a table, by column; the columns depend on the run."""


class _Origin(TypedDict):
    config: dict[str, Any]
    """Settings of the run, see `RunConfig.as_dict`."""
    versions: dict[str, str]
    """By package, and of `python`."""
    hardware: dict[str, Any]
    """See `hardware.hardware`."""
    command: str
    commit: str | None
    """None outside a checkout."""
    date: str
    """ISO 8601, UTC."""


class Provenance(_Origin, total=False):
    """Where a result came from."""

    seed: int
    seconds: float | None
    notes: list[str]
    """Sentences that a reader must know."""
    limited: bool
    """Whether a limit left samples out; older runs lack it."""


class Scores(TypedDict):
    """Accuracy and paired comparisons over the samples of one question family, or of all; what cannot be said is None.

    Accuracies and differences are fractions; `low` and `high` are ends of 95 percent bootstrap intervals.
    """

    n: int
    """Samples."""
    accuracy: float
    """Mean score."""
    ci_low: float
    ci_high: float
    relative: float | None
    """Share of the unpruned model's accuracy."""
    vs_unpruned: float | None
    """Accuracy minus that of the unpruned model, on the samples of both."""
    vs_unpruned_low: float | None
    vs_unpruned_high: float | None
    vs_unpruned_won: int | None
    """Samples that scored higher than with the unpruned model."""
    vs_unpruned_lost: int | None
    """Samples that scored lower."""
    vs_unpruned_p: float | None
    """Exact McNemar test, two-sided."""
    vs_unpruned_holm: float | None
    """The p-value corrected for all points of a model and task; only of all samples, not of a family."""
    vs_unpruned_needed: int | None
    """Samples that would show a difference like this one with 80 percent power."""
    vs_unpruned_detectable: float | None
    """Smallest difference that these samples show with that power."""
    vs_random: float | None
    """This and the next eight: the same against `random` at the same budget."""
    vs_random_low: float | None
    vs_random_high: float | None
    vs_random_won: int | None
    vs_random_lost: int | None
    vs_random_p: float | None
    vs_random_holm: float | None
    vs_random_needed: int | None
    vs_random_detectable: float | None
    discriminating: float | None
    """Accuracy on the samples that `downsample` at the same budget gets wrong."""
    discriminating_low: float | None
    discriminating_high: float | None
    discriminating_n: int | None
    """How many these are."""
    headroom_won: float | None
    """(this - random) / (oracle - random) at the same budget."""
    headroom_won_low: float | None
    headroom_won_high: float | None


EqualCost = TypedDict(
    "EqualCost",
    {
        "difference": float,
        "low": float,
        "high": float,
        "n": int,
        "p": float,
        "holm": float,
        "needed": int | None,
        "from": float,
        "to": float,
    },
)
"""A point minus a control at the point's cost, see `statistics.equal_cost.Difference`; `from` and `to` are the costs of
the control between which it was interpolated, `holm` is the p-value corrected for all points of a model and task."""

AreaUnderCurve = TypedDict(
    "AreaUnderCurve",
    {
        "value": float,
        "low": float,
        "high": float,
        "from": float,
        "to": float,
        "vs_random": float | None,
        "vs_random_low": float | None,
        "vs_random_high": float | None,
    },
)
"""Mean accuracy of a series over the logarithm of the cost `from` .. `to`, with its interval, and minus random's."""


class _Summarised(TypedDict):
    point: str
    """Key of the point, `model|task|method(options)@keep`."""
    model: str
    task: str
    """As the sweep file names it; `all` for the samples of all tasks."""
    method: str
    keep: int | float | str | None
    """The budget, see `points.Point`."""
    reference: bool
    """Run only so that others can be compared with it."""
    seed: int | None
    """Of a method that draws, where the run has several."""
    options: dict[str, Any]
    shown: str | None
    """What its file or `as` calls method and options; None: what they are. Older runs lack it."""
    label: str
    """`holov(variant=official)@64`."""
    series: str
    """The label without its budget."""
    overall: Scores
    families: dict[str, Scores]
    """By question family."""
    visual_tokens: float
    """Of a prompt before pruning, averaged over the samples."""
    kept_tokens: float
    """Visual tokens that the decoder saw, averaged over its layers and the samples."""


class ResultRecord(_Summarised, Costs, total=False):
    """A point and what came out; `kv`, `times` and `flops` are there where they were measured."""

    task_name: str
    """What a task file calls itself."""
    equal_cost: dict[str, dict[str, EqualCost]]
    """By kind of cost ("tokens", "flops") and control."""
    area: dict[str, AreaUnderCurve]
    """By kind of cost: of the series that the point belongs to; only where the series covers the whole span."""
    failed: int
    """Samples without an answer."""
    metrics: dict[str, float]
    """What the task itself computes over all of its samples, in its own units."""
    provenance: Provenance
    """In `results.jsonl` only."""


class View(TypedDict):
    """One picture file of a sample."""

    file: str
    """Name in the folder `pictures`."""
    rows: int
    cols: int
    """Of the raster of visual tokens that lies over it."""
    start: int
    """Index of the raster's first token among those of the visual."""
    kind: str
    """`image`, `crop`, ..., see `Raster`."""
    visual: int
    """Which visual of the prompt; runs of before it was written have but one."""


class Picture(TypedDict):
    """An entry of `pictures/index.json`."""

    model: str
    task: str
    sample_id: str
    views: list[View]
