"""Towers whose blocks attend inside of windows, most of them, and whose rows are sorted by these (Qwen2.5-VL)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def has_windows(vision: Any) -> bool:
    """Whether a vision config speaks of such windows."""
    return hasattr(vision, "window_size") and hasattr(vision, "fullatt_block_indexes")


def window_order(module: Any, vision: Any, grids: Sequence[tuple[int, int]]) -> Tensor:
    """`[cells]` int64 on the CPU: which cell, counted over all pictures, is at each place of the tower's row.

    Args:
        module: the tower.
        vision: its config.
        grids: (rows, cols) of cells by picture; frames of a video count as pictures, windows lie within one.
    """
    merge = vision.spatial_merge_size
    boxes = torch.tensor([[1, rows * merge, cols * merge] for rows, cols in grids])
    window_index = getattr(module, "get_window_index", None)
    if window_index is not None:
        index = window_index(boxes)[0]
    else:
        from transformers.vision_utils import get_vision_window_index

        index = get_vision_window_index(
            boxes,
            spatial_merge_size=merge,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
            kwargs={},
        )[0]
    return torch.as_tensor(index).cpu().long()
