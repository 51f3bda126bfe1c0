"""The vision tower run on smaller pictures, for stages at "pixels" that shrink them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.pruner import Stage
from tokenprune.interfaces.selection import grid_places
from tokenprune.state.tower_recording import KeptBeforeProjector, Recording


def run_smaller(
    adapter: Adapter,
    stage: Stage,
    kind: str,
    original: Callable[..., Any],
    call: dict[str, Any],
    recording: Recording,
    shrink: Callable[[list[tuple[int, int]], list[Tensor]], None],
) -> Any:
    """Run the tower on fewer pixels; its tokens stand at their cells' centres, zeros elsewhere (they leave).

    Args:
        stage: whose method says how small.
        kind: "image" or "video".
        original: the model's own features call.
        call: its arguments by name.
        recording: of this run.
        shrink: is told the smaller grids before the tower runs, and where their cells stand, see `TowerPass.shrink`.
    """
    grids = [visual.rasters[0].grid for visual in recording.visuals]
    budgets = [stage.budget.tokens(v.num_tokens) // len(v.rasters) for v in recording.visuals]
    small = [stage.pruner.target_grid(grid, max(budget, 1)) for grid, budget in zip(grids, budgets)]
    if small == grids:
        return original(**call)
    places = []
    for visual, grid, small_grid in zip(recording.visuals, grids, small):
        step = torch.arange(len(visual.rasters))[:, None] * (grid[0] * grid[1])
        places.append((step + torch.tensor(grid_places(grid, small_grid))).flatten().to(recording.device))
    shrink(small, places)
    output = original(**{**adapter.vision.resize(kind, call, recording.visuals, small), "return_dict": True})
    recording.shrunk = small
    recording.kept = [KeptBeforeProjector(index, index.shape[0], {}) for index in places]

    def expand(features: Sequence[Tensor]) -> list[Tensor]:
        sizes = [visual.num_tokens for visual in recording.visuals]
        return [
            tokens.new_zeros(size, tokens.shape[-1]).index_copy(0, index.to(tokens.device), tokens)
            for tokens, size, index in zip(features, sizes, places)
        ]

    adapter.expand_features(output, expand)
    return output
