"""Features of further depths of the tower, which a decoder adds to visual tokens in its first layers: they are cut in
step with the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

DEEPSTACK = ("visual_pos_masks", "deepstack_visual_embeds")
"""Arguments of the decoder: where visual tokens are, and what is added to them layer by layer."""


def deepstack_kwargs(kwargs: Mapping[str, Any], rows: Callable[[Tensor], Tensor], real: Tensor) -> dict[str, Any]:
    """Those arguments for the tokens that stay; takes what `Adapter.per_token_kwargs` does."""
    visual, added = (kwargs.get(name) for name in DEEPSTACK)
    if visual is None or added is None:
        return {}
    short = rows(visual) & real.to(visual.device)
    # which row of `added` belongs to each place; one read for all of them
    number = rows((visual.flatten().cumsum(0) - 1).view(visual.shape))
    left = number.flatten()[short.flatten().nonzero()[:, 0]]
    return {"visual_pos_masks": short, "deepstack_visual_embeds": [values[left] for values in added]}
