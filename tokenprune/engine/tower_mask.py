"""Pictures of which a part is filling, as a mask tells their tower: signals and cuts would take it for picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.capability import TOWER_CUTS, TOWER_SIGNALS


def check_filling(adapter: Adapter, run: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError where the mask of a block hides patches that visual tokens are made of.

    Args:
        run: of the tower, see `VisionTower.start`.
        args, kwargs: what its first block was given.
    """
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = next((one for one in args[1:] if isinstance(one, Tensor) and one.dim() in (2, 4)), None)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return
    if mask.dtype.is_floating_point:
        mask = mask > torch.finfo(mask.dtype).min / 2
    unseen = mask == 0 if mask.dim() == 2 else ~mask.bool().any(dim=2).any(dim=1)  # [M, T]
    states = args[0] if args else kwargs["hidden_states"]
    if states.dim() == 3 and len(unseen) == 1:
        unseen = unseen.expand(states.shape[0], -1)
    if adapter.vision.fills_up(run, unseen):
        raise ValueError(
            f"A mask tells the vision tower of {type(adapter.model).__name__} that a part of a picture is filling, and "
            f"its visual tokens are made of that part too: {TOWER_SIGNALS} and {TOWER_CUTS} would take it for picture. "
            "Let the processor scale pictures to whole tiles, leave out the mask, or use a method that reads features "
            "alone, such as divprune."
        )
