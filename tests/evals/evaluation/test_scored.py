"""Scores that no statistic can be made of are an error of that sample, in a sentence."""

from __future__ import annotations

import math

import pytest

from tokenprune.evals.evaluation.scored import scored
from tokenprune.evals.tasks.task import Sample, Task


@pytest.mark.parametrize("score", [0.0, 0.3, 1.0, True])
def test_a_share_is_a_score(score):
    task = Task("toy", 1, lambda start, stop: iter(()), lambda text, answer: score)
    assert scored(task, Sample("s0", "f", "what?", "a", ()), "b") == {"correct": score}


@pytest.mark.parametrize("score", [math.nan, math.inf, -0.1, 3.0, 100.0])
def test_what_is_no_share_is_said(score):
    task = Task("toy", 1, lambda start, stop: iter(()), lambda text, answer: score)
    found = scored(task, Sample("s0", "f", "what?", "a", ()), "b")
    assert found["correct"] is None and f"toy scored {score!r}. A score lies between 0" in found["error"]
