"""One forward pass of a model with a method at work on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tokenprune


def forward(model: Any, batch: dict[str, Tensor], method: Any, **more: Any) -> tuple[tokenprune.Handle, Tensor]:
    """The handle, which still shows the prompt, and the logits."""
    with tokenprune.applied(model, method) as handle, torch.no_grad():
        return handle, model(**batch, **more).logits
