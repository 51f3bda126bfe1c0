"""Where a family's visuals stand, read off what the model made of them: lengths from its features, grids from what the
call says of its pictures, and only if they have as many cells as there are tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenprune.interfaces.visual import Raster, Visual, features_in, unplaced

_STRIDES = range(1, 17)
_PATCH_GRIDS = ("spatial_shapes", "target_sizes")  # (rows, cols) of patches of each picture


def feature_rows(output: Any) -> list[Tensor]:
    """`[n, D]` of each visual, from the output of a features call.

    Raises:
        ValueError: it does not say which features are whose.
    """
    features = features_in(output)
    if isinstance(features, Tensor):
        if features.dim() != 3:
            raise ValueError(
                f"The model's features have the shape {tuple(features.shape)}, which does not say whose they are; its "
                "family needs a file of its own (docs/guides/adding_a_family.md)."
            )
        return list(features)
    if not isinstance(features, Sequence) or not all(isinstance(own, Tensor) for own in features):
        raise ValueError(
            f"The features call of this model returns {type(output).__name__} without features of each picture "
            "(pooler_output, or a tensor of three dimensions); its family needs a file of its own "
            "(docs/guides/adding_a_family.md)."
        )
    return [own.flatten(0, -2) for own in features]


class Grids:
    """What a call says of the sizes of its visuals; read once for all of them.

    Args:
        kind: "image" or "video".
        call: the call's arguments, by name.
        pixels: the argument with the pixels.
        count: visuals.
        patch: side of a patch in pixels; None if the model does not say.
        merge: patches along a side of a token; None if the model does not say.
    """

    def __init__(
        self,
        kind: str,
        call: Mapping[str, Any],
        pixels: Tensor,
        count: int,
        patch: int | None,
        merge: int | None = None,
    ) -> None:
        self._merge = merge
        named = next((call[n] for n in (f"{kind}_grid_thw", "image_grid_thw") if call.get(n) is not None), None)
        boxes = None if named is None else named.tolist()
        names = [f"{name}_videos" for name in _PATCH_GRIDS] if kind == "video" else _PATCH_GRIDS
        shapes = next((call[name] for name in names if call.get(name) is not None), None)
        if boxes is None and shapes is not None:
            boxes = [[1, *sizes] for sizes in shapes.tolist()]
        sizes = call.get("image_sizes")
        self.broken = boxes is None and sizes is not None  # Pixtral's processor writes a token behind each row
        if boxes is None and sizes is not None and patch:
            sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
            boxes = [[1, int(high) // patch, int(wide) // patch] for high, wide in sizes]
        self._most = pixels.shape[1] if pixels.dim() == 5 else 0  # tiles or frames, those that fill up among them
        if boxes is None and patch and pixels.dim() in (4, 5):
            high, wide = (side // patch for side in pixels.shape[-2:])
            boxes = [[max(1, self._most), high, wide]] * pixels.shape[0]
        self._boxes = boxes if boxes is not None and len(boxes) == count else [None] * count

    def frames_rows_cols(self, index: int, length: int) -> tuple[int, int, int] | None:
        """The grid of one visual's tokens: that of its patches with s x s of them joined, where that has `length`
        cells. None where no s does, or several do (36 tokens of four tiles of 12 x 12 patches may be one tile in 6 x 6
        or all four in 3 x 3) and the model does not say which."""
        box = self._boxes[index]
        if box is None:
            return None
        frames, rows, cols = (int(side) for side in box)
        counts = range(self._most, 0, -1) if self._most else dict.fromkeys((frames, frames // 2, 1))
        found = {
            stride: (moments, rows // stride, cols // stride)
            for moments in counts
            for stride in _STRIDES
            if rows % stride == 0 and cols % stride == 0 and moments * rows * cols == length * stride**2 and moments
        }
        if len(found) > 1:
            return None if self._merge is None else found.get(self._merge)
        return next(iter(found.values()), None)

    def patches(self) -> list[int] | None:
        """Patches of each visual; None if the call does not say."""
        known = [box for box in self._boxes if box is not None]
        return [int(t * rows * cols) for t, rows, cols in known] if len(known) == len(self._boxes) else None


def visuals_of(kind: str, lengths: Sequence[int], grids: Grids | None, scattered: bool = False) -> list[Visual]:
    """One visual for each of `lengths`: frames or tiles of a grid, or tokens in none."""
    found = []
    for index, length in enumerate(lengths):
        grid = None if grids is None else grids.frames_rows_cols(index, length)
        if grid is None or grids is None:
            found.append(unplaced(length, kind))
            continue
        frames, rows, cols = grid
        name = "frame" if kind == "video" else "image" if frames == 1 else "crop"
        rasters = tuple(Raster((rows, cols), frame * rows * cols, name) for frame in range(frames))
        found.append(Visual(rasters, kind=kind, scattered=scattered or frames > 1 or grids.broken))
    return found


def visuals_by_map(states: Tensor, lengths: Sequence[int]) -> list[Visual]:
    """One visual for each of `lengths`, whose tokens are the cells of a map `[n, C, rows, cols]`, row by row; in no
    grid where they are not as many."""
    rows, cols = states.shape[-2:]
    return [
        Visual((Raster((rows, cols)),)) if states.dim() == 4 and rows * cols == length else unplaced(length)
        for length in lengths
    ]
