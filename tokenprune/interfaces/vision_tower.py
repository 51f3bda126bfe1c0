"""What an adapter must say of its vision tower, and what the engine asks of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenprune.cost import ModelShape, tower_flops
from tokenprune.interfaces.signals import TowerInfo
from tokenprune.interfaces.visual import TowerWork, Visual


class VisionTower:
    """The vision tower of one loaded model: where its blocks are, and how their tokens are read and thinned out.

    The tower works on pictures ("crops" of a `Visual`), each of `cells` tokens: patches, or groups of patches where the
    tower merges them into one visual token.

    Attributes:
        facts: what methods may know.
        blocks: its transformer blocks.
        signals: names of the signals that it can record.
        module: the whole tower.
        exit: the module whose output are the visual tokens of all pictures: the projector, or the merger.
        can_cut: whether tokens can leave after a block.
        can_merge: whether cells can be given other states between two blocks: those whose cells are single patches.
        can_resize: whether it takes pictures of other sizes than the processor's.
        patches_per_cell: patches that one visual token comes from.
        moments: frames that a patch spans, the slowest index of its pixels of one colour.
        restores_blocks: whether the length is restored behind each block, so that what comes behind them works on all
            cells.
    """

    facts: TowerInfo
    blocks: Sequence[Any]
    signals: tuple[str, ...] = ()
    module: Any
    exit: Any
    can_cut: bool = False
    can_merge: bool = False
    can_resize: bool = False
    patches_per_cell: int = 1
    moments: int = 1
    restores_blocks: bool = False

    @property
    def exits(self) -> Sequence[Any]:
        """All modules that make visual tokens of the tower's states: `exit`, and those for other depths."""
        return (self.exit,)

    def hook_attention(self, block: int, done: Any) -> list[Any]:
        """Hook a block so that `done(read)` is called when its attention ran.

        `read(run, pictures, count)` gives query, key and value `[m, H, T, d]` of pictures that all have `count` cells
        left; T counts patches, and a [CLS] token before them if there is one. Patches are in the tower's order,
        see `in_raster_order`. `run` is what `start` made.

        Returns:
            The removable hook handles.
        """
        raise TypeError(f"{type(self).__name__} records no signals.")

    def hook_states(self, block: int, done: Callable[[Tensor], None]) -> list[Any]:
        """Hook a block so that `done(hidden)` is called with the hidden states that it leaves, in the form in which the
        tower has them and `states` reads them.

        Returns:
            The removable hook handles.
        """

        def on_output(module: Any, args: Any, output: Any) -> None:
            done((output[0] if isinstance(output, tuple) else output).detach())

        return [self.blocks[block].register_forward_hook(on_output)]

    def start(self, grids: Sequence[tuple[int, int]]) -> Any:
        """What the other calls need to know of one run; `grids` are (rows, cols) of cells by picture."""
        return None

    def states(self, run: Any, args: Any, pictures: Sequence[int], count: int) -> Tensor:
        """Hidden states `[m, count, D]` of pictures that all have `count` cells, mean over the patches of a cell."""
        raise TypeError(f"{type(self).__name__} cannot be cut inside.")

    def drop_tokens(self, run: Any, args: Any, kwargs: Any, kept: Sequence[Tensor] | None) -> tuple[Any, Any]:
        """Arguments for a block of a run that was cut.

        Args:
            kept: for a block before which tokens leave, the cells that stay, `[k]` int64 indices into those that were
                left before, one tensor a picture; None for blocks after it, whose hidden states are short already.
        """
        raise TypeError(f"{type(self).__name__} cannot be cut inside.")

    def replace_states(self, run: Any, args: Any, kept: Sequence[Tensor], merged: Sequence[Tensor | None]) -> Any:
        """Arguments for a block with other states at cells that stay, before the others leave.

        Args:
            kept: as for `drop_tokens`.
            merged: `[k, D]` for each picture, or None where its cells keep their own.
        """
        raise TypeError(f"{type(self).__name__} cannot be given merged states.")

    def restore_length(self, run: Any, output: Tensor, alive: Sequence[Tensor]) -> Tensor:
        """Output of one of `exits` at full length: zeros where tokens left; `alive` are the cells left of each picture.
        An output that has its full length already is handed back."""
        raise TypeError(f"{type(self).__name__} cannot be cut inside.")

    def masked_attention(self, block: int) -> Any:
        """The module that is given a mask where pictures keep different numbers of cells, if that is not the block:
        `attention_mask` makes it, and it goes by that name. None if it is, or where no mask is needed."""
        return None

    def attention_mask(self, run: Any, block: int, states: Tensor) -> Tensor | None:
        """The mask for `masked_attention`; None while none is needed.

        Args:
            states: what that module is given.
        """
        return None

    def hide_keys(self, block: int, gone: Tensor, rows: int) -> list[Any]:
        """Let a block's attention be computed in the open, without the keys of some rows: what taking them out is held
        against.

        Args:
            gone: `[M, T]` or `[1, T]` bool, the rows that nothing is to see, of the states that the block is given.
            rows: how many of the others are computed, evenly over each row of states; the rest are zeros.

        Returns:
            The removable hooks; the first says in `computed` which rows were, `[M, T]` bool.
        """
        raise TypeError(f"{type(self).__name__} hides no keys.")

    def fills_up(self, run: Any, unseen: Tensor) -> bool:
        """Whether patches of tokens are among those that no other sees, as those of padding inside a picture are.

        Args:
            unseen: `[M, T]` or `[1, T]` bool, in the rows of the tower's states.
        """
        return bool(unseen.any())

    def computed(self, run: Any, counts: Sequence[int]) -> list[int]:
        """Cells of each picture that are computed where so many are left: padding costs what a token costs."""
        return list(counts)

    def by_cell(self, values: Tensor) -> Tensor:
        """From `[m, patches, ...]` to `[m, cells, ...]`: the mean over each cell's patches."""
        return values

    def in_raster_order(self, run: Any, values: Tensor, pictures: Sequence[int]) -> Tensor:
        """From the order in which the tower has the cells of some pictures, `[m, cells, ...]`, to that of their
        rasters."""
        return values

    def patch_pixels(self, pixels: Tensor, pictures: int) -> Tensor:
        """`[pictures, patches, C, n]`: the n normalised pixel values of each patch and colour, in the order of patches
        that `by_cell` takes.

        Args:
            pixels: of one visual, see `Adapter.pixel_rows`.
            pictures: how many the tower gets of it.
        """
        raise TypeError(f"{type(self).__name__} cuts no pixels into patches.")

    def pixels_by_cell(self, values: Tensor, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        """`[cells, ...]` of each picture, from values `[pictures, patches, ...]` in the order of `patch_pixels`.

        Args:
            grids: (rows, cols) of cells of each picture.
        """
        return list(self.by_cell(values))

    def cell_pixels(self, pixels: Tensor, grids: Sequence[tuple[int, int]], kind: str) -> list[Tensor]:
        """`[cells, C, n]` of each picture: the normalised pixel values of each cell and colour, cells in raster order.

        Where a patch has several moments, those of an image are the same picture over again: the first is given.

        Args:
            pixels: as for `patch_pixels`.
            grids: (rows, cols) of cells of each picture that the tower gets of the visual.
            kind: "image" or "video".
        """
        patches = self.patch_pixels(pixels, len(grids))  # [m, patches, C, n]
        if kind == "image" and self.moments > 1:
            patches = patches[..., : patches.shape[-1] // self.moments]
        return list(patches.unflatten(1, (-1, self.patches_per_cell)).transpose(2, 3).flatten(3))

    def flops(self, shape: ModelShape, work: TowerWork) -> int | None:
        """Floating-point operations of one run of the tower, by the conventions of `tokenprune.cost`; None where they
        are not modelled."""
        pictures = [rows * cols * self.patches_per_cell for rows, cols in work.grids]
        return tower_flops(shape, pictures, work.blocks, work.first)

    def resize(
        self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual], grids: Sequence[tuple[int, int]]
    ) -> Mapping[str, Any]:
        """Arguments of the features call with each picture (each frame of a video) of `visuals` shrunk so that the
        tower makes a raster of `grids` tokens of it."""
        raise TypeError(f"{type(self).__name__} cannot run at another size.")
