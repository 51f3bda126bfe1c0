"""Keeps what changed since the frame before, all frames of a video together (EVS, efficient video sampling).

Source: the EVS of vLLM (multimodal/evs.py, Apache-2.0), described in "Efficient Video Sampling: Pruning Temporally
Redundant Tokens for Faster VLM Inference", https://arxiv.org/abs/2510.14624 (not read).
This file was written from the formulas, no code was copied.

A token's score is 1 - its cosine with the token at the same place of the frame before; those of the first frame come
before all others. The highest k stay, ties in the order of the video. Kept tokens keep their positions.

    s_{t,p} = 1 - cos(x_{t,p}, x_{t-1,p}),  frame t, place p

Deviations:
- The budget is exact. vLLM keeps at least the tokens of one frame; here a smaller budget keeps the first of them.
- A token whose place in the frame before is empty, because an earlier cut took it, comes first as well.
- What has no frame before it, a picture or its crops, is spread evenly in raster order (our choice; vLLM leaves
  pictures whole).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, refuse_nan, topk_indices
from tokenprune.interfaces.view import View
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
        """`[M, N]` fp32."""
        features = view.features.float()
        refuse_nan(features)
        before = self.before(view)
        earlier = features.gather(1, before.clamp_min(0)[..., None].expand_as(features))
        changed = 1 - (normalize(features, dim=2) * normalize(earlier, dim=2)).sum(dim=2)
        return changed.masked_fill(before < 0, _FIRST)

    @staticmethod
    def before(view: View) -> Tensor:
        """`[M, N]` int64, which of the tokens stands at the same place of the frame before; -1 where none does."""
        device, total = view.features.device, sum(raster.num_tokens for raster in view.rasters)
        parts = [torch.full((raster.num_tokens,), -1, device=device) for raster in view.rasters]
        for number, (one, other) in enumerate(pairwise(view.rasters), start=1):
            if one.grid == other.grid and one.kind == other.kind == "frame":
                parts[number] = torch.arange(one.start, one.start + one.num_tokens, device=device)
        place_before = torch.cat(parts)
        if view.tokens is None:
            return place_before.expand(view.num_images, -1)
        tokens = view.tokens.to(device)
        rows = torch.arange(view.num_tokens, device=device).expand_as(tokens)
        standing = torch.full((view.num_images, total), -1, device=device).scatter(1, tokens, rows)
        wanted = place_before[tokens]
        return torch.where(wanted >= 0, standing.gather(1, wanted.clamp_min(0)), -1)

    def select(self, view: View) -> Selection:
        frames = [raster for raster in view.rasters if raster.kind == "frame"]
        if len(frames) > 1:
            return Selection(topk_indices(self.score(view), view.budget))
        k, count = view.budget, view.num_tokens
        places = (2 * torch.arange(k, device=view.features.device) + 1) * count // (2 * k)
        return Selection(places.expand(view.num_images, -1))
