"""Smaller pictures: what their budget counts."""

from __future__ import annotations

from _families import batch_of, family
from _forward import forward


def test_a_budget_of_fewer_pixels_is_that_of_the_whole_video():
    handle, _ = forward(family("qwen2_vl"), batch_of("qwen2_vl", "mixed_left"), "downsample@6")
    assert max(len(kept) for row in handle.kept for kept in row) <= 6
