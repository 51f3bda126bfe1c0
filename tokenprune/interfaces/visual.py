"""One image or one video of a prompt: its grids of tokens, as the processor lays them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Raster:
    """Tokens of one grid: a whole image, one crop of it, or one frame of a video.

    Attributes:
        grid: (rows, cols), in raster order.
        start: index of its first token among the tokens of its visual.
        kind: "image", "thumbnail", "mosaic", "crop" or "frame"; "unplaced" for tokens that stand in no grid, which
            count as one row.
    """

    grid: tuple[int, int]
    start: int = 0
    kind: str = "image"

    @property
    def num_tokens(self) -> int:
        """rows * cols."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, eq=False)
class Visual:
    """One image or one video, as the processor lays it out. Adapters make these.

    A visual has placeholders in the prompt. Most are one token of a raster each; the others are separators (row ends,
    frame ends), which carry no picture: they stay while their visual is whole and leave with its first cut.

    Attributes:
        rasters: its grids, in the order of its tokens.
        kind: "image" or "video".
        placeholders: how many it has, separators included; None means one per token.
        offsets: `[N]` int64, which placeholder each token is at; None where there are no separators.
        crops: (rows, cols) of what the vision tower saw of it, in tower order; None means the rasters themselves.
        sources: `[N]` int64, the cell of the concatenated crops that each token comes from; None means in order.
        resample: from values by cell of the crops to values by token, `[cells, ...]` -> `[N, ...]`, where tokens are
            mixed from several cells; None means `sources`.
        projected: tokens that the projector makes of it; None means one of each cell of the crops.
        scattered: whether text may come between its placeholders (time stamps of frames, labels of tiles).
    """

    rasters: tuple[Raster, ...]
    kind: str = "image"
    placeholders: int | None = None
    offsets: Tensor | None = None
    crops: tuple[tuple[int, int], ...] | None = None
    sources: Tensor | None = None
    resample: Callable[[Tensor], Tensor] | None = None
    projected: int | None = None
    scattered: bool = False

    @property
    def num_tokens(self) -> int:
        """N, tokens that a method can choose among."""
        return sum(raster.num_tokens for raster in self.rasters)

    @property
    def length(self) -> int:
        """Placeholders in the prompt."""
        return self.num_tokens if self.placeholders is None else self.placeholders

    @property
    def tower_grids(self) -> tuple[tuple[int, int], ...]:
        """Grids that the vision tower works on."""
        return tuple(raster.grid for raster in self.rasters) if self.crops is None else self.crops


def one_raster(grid: tuple[int, int]) -> Visual:
    """An image that is a single grid, with no separators."""
    return Visual((Raster(grid),))


def unplaced(count: int, kind: str = "image") -> Visual:
    """A visual whose tokens stand in no grid that is known: latents of a resampler, or a grid that nothing tells."""
    return Visual((Raster((1, count), 0, "unplaced"),), kind=kind, scattered=True)


class Pictures(NamedTuple):
    """How the visuals that a tower gives of one prompt make its pictures.

    Attributes:
        counts: visuals of each picture, in order.
        note: what a reader of a report must know where the prompt does not say; "" where it does.
        grids: (rows, cols) of each picture where its visuals are single tokens and the prompt says how they stand.
    """

    counts: tuple[int, ...]
    note: str = ""
    grids: tuple[tuple[int, int], ...] | None = None


def joined(visuals: Sequence[Visual], grid: tuple[int, int] | None = None) -> Visual:
    """One picture of its tiles, whose rasters are those of the tiles one after the other.

    Args:
        visuals: its tiles.
        grid: (rows, cols) of the picture where each tile is one token; None where its tiles have grids of their own.

    Raises:
        ValueError: a tile has separators, or crops of its own.
    """
    if grid is not None:
        if grid[0] * grid[1] != len(visuals) or any(visual.length != 1 for visual in visuals):
            raise ValueError(f"{len(visuals)} tiles that should be one token each are no grid of {grid}.")
        return replace(visuals[0], rasters=(Raster(grid),))
    if len(visuals) == 1:
        return visuals[0]
    rasters: list[Raster] = []
    start = 0
    for visual in visuals:
        if visual.offsets is not None or visual.crops is not None or visual.length != visual.num_tokens:
            raise ValueError("Only visuals that are one token a placeholder can be tiles of one picture.")
        for raster in visual.rasters:
            kind = "crop" if raster.kind == "image" else raster.kind
            rasters.append(Raster(raster.grid, start + raster.start, kind))
        start += visual.num_tokens
    return replace(visuals[0], rasters=tuple(rasters), placeholders=None)


@dataclass(frozen=True)
class TowerWork:
    """One run of the vision tower over pictures.

    Attributes:
        grids: (rows, cols) of visual tokens that the tower makes of each picture.
        blocks: patches in each block from `first` on, per picture, where tokens left inside the tower; else empty.
        first: the block that `blocks` begins with.
        left: visual tokens that the projector makes, all pictures together.
        whole: as many as it would make if nothing left the tower.
        plain: the grids as they would have been, where a method shrank the pictures.
        cuts: by cut inside the tower, the block after which it was (-1: before the first), and the cells left of each
            picture.
        videos: whether the pictures are frames of videos.
    """

    grids: tuple[tuple[int, int], ...]
    blocks: tuple[tuple[int, ...], ...] = ()
    first: int = 0
    left: int = 0
    whole: int = 0
    plain: tuple[tuple[int, int], ...] = ()
    cuts: tuple[tuple[int, tuple[Tensor | None, ...]], ...] = ()
    videos: bool = False


def features_in(output: Any) -> Tensor | Sequence[Tensor] | None:
    """The features in the output of a features call: its `pooler_output`; those that are added first where all are
    added inside the decoder, `(layer, features)` each; its `last_hidden_state` where it has no other; the output itself
    where that is a tensor or a sequence of them, as code that comes with a checkpoint has it; None if it holds none."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (list, tuple)) and output and all(isinstance(part, Tensor) for part in output):
        return output
    pooled, added = (getattr(output, name, None) for name in ("pooler_output", "deepstack_features"))
    if pooled is None and added and all(isinstance(part, tuple) for part in added):
        return min(added, key=lambda part: part[0])[1]
    return getattr(output, "last_hidden_state", None) if pooled is None else pooled
