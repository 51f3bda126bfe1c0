"""What a run under a method is given, and what its decoder was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def example_hints(method: Any, images: int) -> dict[str, list[Any]]:
    """A value for every hint that a method may want."""
    known = {
        "boxes": [
            [[0.1, 0.2, 0.3, 0.5]] if i % 2 == 0 else [[0.6, 0.1, 0.9, 0.2], [0.0, 0.8, 0.1, 1.0]]
            for i in range(images)
        ],
        # as many as make whole frames of any small video
        "frame_scores": [[(5 * i + 3 * image) % 11 / 11 for i in range(12)] for image in range(images)],
    }
    return {name: known[name] for name in method.needed_hints}


def attended_rows(fed: dict[str, Any], prompt: Any) -> Tensor:
    """`[B, P]` bool, False at padding of the rows that a decoder was given.

    Args:
        fed: its arguments.
        prompt: what it ran.
    """
    mask, shape = fed["attention_mask"], fed["inputs_embeds"].shape[:2]
    if mask is None:
        return torch.ones(shape).bool()
    if not isinstance(mask, dict) and mask.dim() == 2:
        return mask.bool()
    # masks that were made before the decoder, of rows that are padded on the left
    at_input = [cut for cut in prompt.cuts if not cut.site.startswith("layer")][-1:]
    lengths = torch.tensor(at_input[0].lengths if at_input else prompt.lengths)
    return torch.arange(shape[1]) >= shape[1] - lengths[:, None]
