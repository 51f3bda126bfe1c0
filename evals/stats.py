"""Intervals for accuracies: percentile bootstrap over samples, and its paired form for a difference of two methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 percent bootstrap interval; `n` is the number of samples behind it."""

    value: float
    low: float
    high: float
    n: int


def bootstrap_mean(scores: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of `scores` with the 2.5 and 97.5 percentiles of the mean over resamples with replacement.

    Args:
        scores: one number per sample, for an accuracy 0 or 1.
        seed: of the resampling, so that a result file is reproducible.

    Raises:
        ValueError: no samples.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        raise ValueError("An interval needs at least one sample, got none.")
    means = _resampled_means(values, seed, resamples)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high), int(values.size))


def paired_difference(
    scores: Sequence[float], baseline: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Mean of `scores - baseline` over the same samples in the same order, with its bootstrap interval.

    Resampling the differences keeps the pairs together, so what is hard for both methods cancels.

    Raises:
        ValueError: the two differ in length, or hold no samples.
    """
    if len(scores) != len(baseline):
        raise ValueError(f"A paired difference needs the same samples twice, got {len(scores)} and {len(baseline)}.")
    differences = np.asarray(scores, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    return bootstrap_mean(differences.tolist(), seed, resamples)


def _resampled_means(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """`[resamples]` means. Scores take few distinct values, so counts per value are drawn, not samples: same law."""
    distinct, counts = np.unique(values, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(values.size, counts / values.size, size=resamples)
    return draws @ distinct / values.size


def median_iqr(values: Sequence[float]) -> dict[str, float]:
    """Median, 25 and 75 percentiles and count of repeated measurements, under `median`, `q25`, `q75`, `n`."""
    if not len(values):
        raise ValueError("A median needs at least one measurement, got none.")
    low, middle, high = np.percentile(np.asarray(values, dtype=np.float64), [25, 50, 75])
    return {"median": float(middle), "q25": float(low), "q75": float(high), "n": len(values)}
