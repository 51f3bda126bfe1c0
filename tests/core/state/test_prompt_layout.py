"""Where the visual tokens of a batch are."""

from __future__ import annotations

import pytest
import torch

from tokenprune.interfaces.visual import one_raster
from tokenprune.state.prompt_layout import build_layout


def test_layout_of_a_ragged_batch():
    visual = torch.zeros(3, 12, dtype=torch.bool)
    visual[0, 2:6] = visual[0, 6:10] = visual[2, 0:4] = True
    layout = build_layout({"image": visual}, {"image": [one_raster((2, 2))] * 3})
    assert [(s.sample, s.image, s.places.tolist()) for s in layout.spans] == [
        (0, 0, [2, 3, 4, 5]), (0, 1, [6, 7, 8, 9]), (2, 0, [0, 1, 2, 3]),
    ]  # fmt: skip
    assert layout.visual_tokens == 12 and layout.order == (0, 1, 2)
    with pytest.raises(ValueError, match="hold 12 image tokens"):
        build_layout({"image": visual}, {"image": [one_raster((2, 2))] * 2})
