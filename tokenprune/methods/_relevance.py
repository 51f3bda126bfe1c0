"""How relevant each visual token is to the question, for methods that leave open where that comes from.

- "embedding": cosine of each token with the mean embedding of the text behind the last visual token, from the
  decoder's table of embeddings. An extension of ours, for models without a text tower in the space of the pictures.
- "hint": numbers that the caller has, `handle.set_hints(relevance=[...])`, for each image or video one list with a
  number for each of its tokens, crop after crop (`tokenprune.clip_relevance` makes such).
- "none": the question is not read.
"""

from __future__ import annotations

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
TOKEN_HINTS = ("relevance",)
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
        values = torch.stack([value.to(view.features.device) for value in view.hints["relevance"]])
    else:
        text = normalize(view.signal(INSTRUCTION_EMBEDDING, 0), dim=1)  # [M, D]
        unit = normalize(view.features.float(), dim=2)
        # one image at a time: the same bits in any batch
        values = torch.stack([(one @ words[:, None])[:, 0] for one, words in zip(unit, text, strict=True)])
    refuse_nan(values)
    return values
