"""Keeps tokens that are far apart: max-min diversity over the visual embeddings, farthest point first (DivPrune).

Paper: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", Alvar et al., CVPR 2025,
https://arxiv.org/abs/2503.02175.
Official code: vbdi/divprune at 799e2d9.
Licence: CC BY-NC 4.0 upstream; this file was written from the formulas, no code was copied.

Distance is 1 - cosine between the embeddings that the LLM would get. The first token is the one whose nearest neighbour
is farthest; then, again and again, the token with the largest distance to its nearest chosen one (code).

    d_ij = 1 - cos(x_i, x_j)
    s_1 = argmax_i min_{j != i} d_ij,  s_{t+1} = argmax_i min_{j in S_t} d_ij

Deviations:
- The running minimum is updated in place, k steps of O(N); the official loop gathers rows anew. Same result.
- fp32 throughout: the official half-precision Gram product gives ties and negative distances near 0 (our choice).
- A chosen token is out of the race; in the official code it has distance 0 and can be picked twice among duplicates.
- A row of zeros has no direction: it is at distance 1 from every other row, another row of zeros included, and so is
  taken early among rows that are alike (our choice; a division by its length gives NaN).
- The budget is an exact count; the official code rounds a ratio (default 0.098, 56 of 576).
- Each image or video is selected on its own, its crops or frames together; the official code knows one image a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection
from tokenprune.interfaces.signals import TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.kernels.greedy_diversity import greedy_diversity, greedy_diversity_flops
from tokenprune.registry import register_method


@register_method("divprune")
@dataclass
class DivPrune(Pruner):
    """Picks k of the N `[N, D]` embeddings by farthest-point traversal under cosine distance, sorted afterwards.

    It needs no attention and has no options of its own.
    """

    default_scope: ClassVar[str] = "visual"
    published: ClassVar[str] = "arXiv 2503.02175, vbdi/divprune"
    reproduces: ClassVar[str] = (
        "LLaVA-1.5-7B at 64 of 576: GQA 57.1, POPE 85.3, TextVQA 54.5 (re-run in one environment: "
        "arXiv 2606.01711, Table 1)"
    )

    def select(self, view: View) -> Selection:
        chosen = greedy_diversity(view.features, view.budget, "k_center")  # [M, k]
        return Selection(chosen.sort(dim=1).values)

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        return greedy_diversity_flops(num_images, num_tokens, width, keep, has_first=False)
