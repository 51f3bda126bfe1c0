"""Keeps the visual tokens that [CLS] attends to most, attention summed over the last vision layers (VTC-CLS).

Paper: "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs", Wang et al.,
https://arxiv.org/abs/2412.05819. Only the abstract could be read; what follows is the official code's behaviour.
Official code: THU-MIG/VTC-CLS at e41ac9b (23 Apr 2025).
Licence: Apache-2.0 upstream; this file was written from the formulas, no code was copied.
Published: LLaVA-1.5-7B, of 576 tokens 256 / 128 / 64: GQA 60.3 / 58.2 / 55.7 of 62.0, POPE 86.2 / 84.0 / 78.8 of 85.9,
TextVQA 57.7 / 56.8 / 55.5 of 58.3 (a picture of a table in the official README; its start layer is unverified).

For LLaVA-1.5, whose tokens leave CLIP after block 22 of 0..23, the score of a patch is the plain sum over the blocks
16..22 of the head-mean attention that [CLS] pays to it (code). Block 23 is left out: its output is unused (code).

    s_j = sum_{l=16}^{22} (1 / H) sum_h A_{l,h}[CLS, j]

Deviations:
- Selection happens after the projector, not before it. The projector works on each token alone, so the kept tokens
  are the same up to float error; the projector's cost on the dropped ones is not saved.
- Ties go to the lower raster index; the official code leaves them to torch.topk (our choice).
- Batches are selected per image; the official helper is right for one image only.
- Without [CLS] (SigLIP, Qwen) the attention that a patch gets from all patches stands in, by default in the feature
  layer alone: an extension of ours, labelled in reports. Sums over blocks count blocks whose windows keep most patches
  apart; they cost N^2 products each, and do worse than the single block on pocket-qwen.
- Thumbnails, mosaics of crops and frames are ranked each on its own, with their share of the budget.
The start layer behind the published tables is unverified: the README lets the user choose, 16 is the code's default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.signals import Signal, TowerInfo, summary_attention
from tokenprune.interfaces.view import View
from tokenprune.registry import register_method


@register_method("vtc_cls")
@dataclass
class VtcCls(Pruner):
    """Ranks the N patches by [CLS] attention, fp32, summed over vision blocks and averaged over heads.

    Attributes:
        start_layer: first vision block of the sum, 0-based; the last one is the tower's feature layer. None means two
            thirds of the depth, floor(2 L / 3), at most the feature layer: the official default 16 at L = 24, and our
            choice at other depths; without [CLS] the feature layer. The feature layer itself gives the ranking of a
            single block.
    """

    published: ClassVar[str] = "arXiv 2412.05819, THU-MIG/VTC-CLS"

    start_layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_layer is not None and (isinstance(self.start_layer, bool) or self.start_layer < 0):
            raise ValueError(f"start_layer must be None or a block number from 0 on, got {self.start_layer!r}.")

    def layers(self, tower: TowerInfo) -> range:
        """The vision blocks that are summed, 0-based.

        Raises:
            ValueError: the start layer lies behind the feature layer, so there is nothing to sum.
        """
        if self.start_layer is None and not tower.has_cls:
            start = tower.feature_layer
        elif self.start_layer is None:
            start = min(2 * tower.num_layers // 3, tower.feature_layer)
        else:
            start = self.start_layer
        if start > tower.feature_layer:
            raise ValueError(
                f"start_layer must be at most {tower.feature_layer}, the block whose output becomes the visual tokens "
                f"of this tower, got {start}."
            )
        return range(start, tower.feature_layer + 1)

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        return tuple(summary_attention(tower, layer) for layer in self.layers(tower))

    def notes(self, tower: TowerInfo) -> tuple[str, ...]:
        if tower.has_cls:
            return ()
        return ("extension: no [CLS] in this tower, the attention that patches receive stands in",)

    def score(self, view: View) -> Tensor:
        first, *others = (view.signal(s.name, s.layer, *s.settings).float() for s in self.signals(view.tower))
        total = first
        for rows in others:
            total = total + rows
        return total
