"""Keeps what changed since the frame before, all frames of a video together (EVS, efficient video sampling).

Source: the EVS of vLLM (multimodal/evs.py, Apache-2.0), described in "Efficient Video Sampling: Pruning Temporally
Redundant Tokens for Faster VLM Inference", https://arxiv.org/abs/2510.14624 (not read).
This file was written from the formulas, no code was copied.

A token's score is 1 - its cosine with the token at the same place of the frame before; those of the first frame come
before all others. The highest k stay, ties in the order of the video. Kept tokens keep their positions.

Deviations:
- The budget is exact. vLLM keeps at least the tokens of one frame; here a smaller budget keeps the first of them.
- What has no frame before it, a picture or its crops, is spread evenly in raster order (our choice; vLLM leaves
  pictures whole).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, topk_indices
from tokenprune.interfaces.view import View
from tokenprune.methods._frames import frame_size
from tokenprune.registry import register_method

_FIRST = 255.0


@register_method("evs")
@dataclass
class Evs(Pruner):
    """Ranks the tokens of a video `[M, F P, D]` by how they differ from the frame before. No options."""

    default_scope: ClassVar[str] = "visual"
    published_positions: ClassVar[str] = "keep"
    published: ClassVar[str] = "arXiv 2510.14624, vLLM"

    def score(self, view: View) -> Tensor:
        """`[M, N]` fp32, of a video."""
        size = frame_size(view)
        unit = normalize(view.features.float(), dim=2).unflatten(1, (-1, size))  # [M, F, P, D]
        changed = 1 - (unit[:, 1:] * unit[:, :-1]).sum(dim=3)
        return torch.cat([torch.full_like(changed[:, :1], _FIRST), changed], dim=1).flatten(1)

    def select(self, view: View) -> Selection:
        if frame_size(view):
            return Selection(topk_indices(self.score(view), view.budget))
        k, count = view.budget, view.num_tokens
        places = (2 * torch.arange(k, device=view.features.device) + 1) * count // (2 * k)
        return Selection(places.expand(view.num_images, -1))
