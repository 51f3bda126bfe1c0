"""What a run measures and draws beside its answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Measure:
    """How times and FLOPs are measured, on the first samples of a task, one at a time.

    Attributes:
        samples: prompts to measure on.
        repeats: timed rounds per prompt; a round runs unpruned, pruned and ideal once each.
        warmup: rounds before that, not counted.
        decode_tokens: generated tokens per prompt from which the time per token is taken; 0 skips it.
        times: whether to measure times.
        flops: whether to count FLOPs with FlopCounterMode, beside the analytic count.
    """

    samples: int = 2
    repeats: int = 5
    warmup: int = 1
    decode_tokens: int = 8
    times: bool = True
    flops: bool = True


@dataclass
class Overlays:
    """Pictures of kept tokens.

    Attributes:
        samples: how many samples of a task get one, spread over its families; 0 means no pictures.
        keep: the budget that the page shows first, one of the run's; None: the smallest.
    """

    samples: int = 3
    keep: int | float | str | None = None
