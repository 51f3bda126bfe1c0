"""How relevant each visual token is to the question, for methods that leave open where that comes from.

- "embedding": cosine of each token with the mean embedding of the text behind the last visual token, from the
  decoder's table of embeddings. An extension of ours, for models without a text tower in the space of the pictures.
- "hint": numbers that the caller has, one list of N for each image (`tokenprune.clip_relevance` makes such).
- "none": the question is not read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.interfaces.selection import refuse_nan
from tokenprune.interfaces.signals import INSTRUCTION_EMBEDDING, Signal
from tokenprune.interfaces.view import View
from tokenprune.registry import near

SOURCES = ("embedding", "hint", "none")
SIGNALS = {"embedding": (Signal(INSTRUCTION_EMBEDDING, 0),)}
HINTS = {"hint": ("relevance",)}
NOTES = {"embedding": ("extension: relevance by the decoder's own embeddings, not by CLIP's text tower",)}


def check_source(source: str) -> None:
    """Raise ValueError unless relevance can come from there."""
    if source not in SOURCES:
        raise ValueError(f"relevance must be one of {', '.join(SOURCES)}, got {source!r}.{near(source, SOURCES)}")


def relevance_of(source: str, view: View) -> Tensor | None:
    """Relevance as it comes, `[M, N]` fp32; None where the question is not read."""
    if source == "none":
        return None
    if source == "hint":
        values = torch.stack([_given(value, view) for value in view.hints["relevance"]])
    else:
        text = normalize(view.signal(INSTRUCTION_EMBEDDING, 0), dim=1)  # [M, D]
        values = (normalize(view.features.float(), dim=2) @ text[:, :, None])[..., 0]
    refuse_nan(values)
    return values


def _given(value: Any, view: View) -> Tensor:
    numbers = torch.as_tensor(value, dtype=torch.float32, device=view.features.device).flatten()
    if len(numbers) != view.num_tokens:
        raise ValueError(
            f"set_hints(relevance=...) must give one number for each of an image's {view.num_tokens} tokens, got "
            f"{len(numbers)}."
        )
    return numbers
