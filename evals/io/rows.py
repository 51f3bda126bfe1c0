"""What the rows of a run folder hold: answers in `samples.jsonl`, costs in `measures.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict, TypeVar

Row = TypeVar("Row", bound=Mapping[str, Any])


class _Filed(TypedDict):
    settings: str
    """Digest of what answers depend on beside the point: code, model, data, seed, ..."""
    point: str
    """Key of the point, `model|task|label`."""
    sample_id: str
    """Unique within the task; `#PLACE` where the sample could not be read."""
    family: str
    """Question family; "" where the sample could not be read."""
    question: str
    """As the task asks it, without the chat template."""
    answer: Any
    """What the task expects: a text, a number, or a list; in `samples.parquet` a text, or JSON."""
    kept: list[list[int]] | None
    """By image of the prompt the raster indices that reached the end, [] where all did; None for samples that get no
    picture."""
    batch: int
    """Prompts that were generated together."""


class _Further(TypedDict, total=False):
    error: str | None
    """Type and message of what was raised; in `samples.jsonl` only where something was."""
    raised_at: str
    """`file.py:line` of it; there with `error`."""
    counted: bool
    """`samples.parquet` only: false where the sample failed, here or at another point."""
    model: str
    """This and the next five are in `samples.parquet` only, and of the point."""
    task: str
    method: str
    seed: int | None
    keep: str | None
    """As text: a column has one type."""
    options: str
    """As JSON."""


class SampleRow(_Filed, _Further):
    """An answer to a sample at a point, or the failure to get one."""

    prediction: str | None
    """What the model said; None where it failed before."""
    correct: float | None
    """Score from 0 to 1; None where the sample failed."""
    visual_tokens: int | None
    """Of the prompt before pruning."""
    kept_tokens: float | None
    """Visual tokens that the decoder saw, averaged over its layers."""


class AnsweredRow(_Filed, _Further):
    """A `SampleRow` that counts: nothing is missing."""

    prediction: str
    correct: float
    visual_tokens: int
    kept_tokens: float


class Quartiles(TypedDict):
    """Of repeated measurements: seconds, or ratios."""

    median: float
    q25: float
    q75: float
    n: int
    """Measurements."""


class KvCosts(TypedDict):
    """The KV cache of one prompt after prefill, averaged over the measured prompts."""

    measured: float
    """Bytes that the real cache holds."""
    analytic: float | None
    """Bytes counted from the sizes; None where a layer is not modelled."""
    unpruned: float | None
    """Bytes counted for the unpruned model."""
    equivalent_tokens: float
    """Visual keys, averaged over layers that hold all of theirs; read off the real cache."""
    per_layer: list[int | float]
    """Bytes by decoder layer, of the first prompt."""
    lengths: list[int | float | None]
    """Keys by decoder layer, of the first prompt; None where a layer has none, or has dropped some."""


FLOPS_PARTS = ("vision", "projector", "selection", "prefill", "decode")
"""Of what FLOPs are counted apart; `total` is beside them."""


class FlopsCosts(TypedDict):
    """FLOPs of one prompt, averaged over the measured prompts; see `profiling.flops`. A part that is not modelled is
    None, and so is a total over it."""

    analytic: dict[str, float | None]
    """Counted from the sizes, by `FLOPS_PARTS` and `total`, which leaves `decode` out."""
    unpruned: dict[str, float | None]
    """The same of the unpruned model."""
    paper: float | None
    """By the papers' simplified formula: decoder layers only, a multiply-add counts once; None for decoders that it was
    not made for, and where visual tokens pass layers by."""
    measured: dict[str, float] | None
    """By FlopCounterMode, as `analytic`; None where it did not run, and then the next two are None too."""
    difference: dict[str, float] | None
    """Analytic over measured minus 1, by part that is modelled; under `layers` the largest of such a decoder layer."""
    agree: bool | None
    """Whether all differences are within `flops.TOLERANCE`; None where they are, and a part is not modelled."""


class TimedCosts(TypedDict):
    """Times and KV bytes of a point, see `timing.measure_times`."""

    kv: KvCosts
    times: dict[str, Quartiles]
    """Seconds of `prefill`, `unpruned_prefill`, `ideal_prefill`, `selection` and `decode` (a token), and the ratios
    `to_ideal`, `to_unpruned` and `selection_share`; the unpruned model has no ideal and no selection. {} where times
    were not asked for."""


class Costs(TypedDict, total=False):
    """What a point costs; what was not measured is missing."""

    kv: KvCosts
    times: dict[str, Quartiles]
    """As in `TimedCosts`."""
    flops: FlopsCosts


class _CostsKey(TypedDict):
    settings: str
    """As in `SampleRow`."""
    point: str
    """As in `SampleRow`."""
    measure: str
    """Digest of the settings of measuring, and of the machine."""
    machine: dict[str, Any]
    """See `hardware.clocked_on`."""


class CostsRow(_CostsKey, Costs, total=False):
    """The costs of a point on a machine, or the failure to measure them."""

    notes: list[str]
    """Sentences that a reader must know; not there where measuring failed."""
    error: str
    """Type and message of what was raised."""
    raised_at: str
    """`file.py:line` of it."""
