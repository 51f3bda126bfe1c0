"""Fewer pixels in: the picture is shrunk before the vision tower, the control that a pruning method has to beat.

Baseline, no paper of its own; why it is mandatory: VTC-Bench (ACL 2026) shows that it beats many published methods on
Qwen2-VL. For a tower with a fixed input size (CLIP in LLaVA-1.5) the position embeddings are interpolated by the
model's own `interpolate_pos_encoding` (our choice: the published control uses models with dynamic resolution, where
the processor shrinks the picture). Bicubic with antialiasing. The tower's cost shrinks as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import fit_grid
from tokenprune.registry import register_method


@register_method("downsample")
@dataclass
class Downsample(Pruner):
    """Runs the vision tower on a smaller picture.

    Keeps rows * cols <= budget tokens, the largest raster within 4:3 of the picture's shape (see `fit_grid`). The kept
    indices it reports are the full raster's places nearest the centres of its cells.
    """

    site: ClassVar[str] = "pixels"
    merges: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True
    published: ClassVar[str] = "control, no paper"

    def target_grid(self, grid: tuple[int, int], budget: int) -> tuple[int, int]:
        return fit_grid(grid, budget)
