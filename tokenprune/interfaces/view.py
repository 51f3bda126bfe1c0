"""What a method is given: images of one shape, from one batch of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokenprune.interfaces.signals import Signal, TowerInfo
from tokenprune.interfaces.site import read_site
from tokenprune.interfaces.visual import Raster


@dataclass
class View:
    """What a method sees: M images of one shape, from one batch of prompts.

    The engine groups the images of a batch by shape, count and budget, so a method never meets padding or ragged rows.
    What an "image" is follows from the method's `scope`: a single raster, or a whole image or video.

    Attributes:
        features: `[M, N, D]` the tokens that are left: visual embeddings as the LLM would get them at "input",
            hidden states entering the layer at "layer:K", those after the block at "vision:L"; at "pixels" the
            pixels of each cell as the image processor normalised them, all of red, then green, then blue.
        rasters: the grids in which the tokens stood before any cut.
        budget: k, how many of the N tokens to keep, 1 <= k < N (at "layer:K" also 0).
        tower: facts on the vision tower.
        signals: recorded tensors by request.
        hints: what the caller knows of each image (see `Handle.set_hints`): name -> one value per image, length M.
        make_keys: computes `keys`.
        site: where this cut is, for example "input" or "layer:9".
        tokens: `[M, N]` int64, which of the tokens of the rasters these are; None while none has left.
        carry: `[M, N]` tensors that an earlier stage of this prompt left with its tokens (`Selection.carry`).
    """

    features: Tensor
    rasters: tuple[Raster, ...]
    budget: int
    tower: TowerInfo
    signals: Mapping[Signal, Tensor] = field(default_factory=dict)
    hints: Mapping[str, list[Any]] = field(default_factory=dict)
    make_keys: Callable[[], Tensor] | None = None
    site: str = "input"
    tokens: Tensor | None = None
    carry: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the raster that the N tokens fill.

        Raises:
            ValueError: they fill no single raster, because some left before or because there are several.
        """
        if self.tokens is not None or len(self.rasters) != 1:
            raise ValueError(
                f"The tokens at {self.site!r} fill no single raster: a method that needs the grid must cut first and "
                "have scope 'raster'."
            )
        return self.rasters[0].grid

    @property
    def depth(self) -> int:
        """L of "vision:L" or K of "layer:K"; 0 elsewhere."""
        return read_site(self.site).depth or 0

    @property
    def num_images(self) -> int:
        """M."""
        return self.features.shape[0]

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.features.shape[1]

    def signal(self, name: str, layer: int, *settings: float, source: str = "") -> Tensor:
        """The signal that the method asked for in `signals()`, `[M, N]` fp32 (`[M]` for those of a whole prompt)."""
        try:
            return self.signals[Signal(name, layer, settings, source)]
        except KeyError:
            asked = ", ".join(f"{signal.name} of block {signal.layer}" for signal in self.signals) or "nothing"
            raise KeyError(f"{name} of block {layer} was not recorded; signals() asked for {asked}.") from None

    def keys(self) -> Tensor:
        """`[M]` int64, one number per image that depends on its pixels and on its place among the prompt's images,
        and not on the prompt's words or the batch it came in: what a random method derives its seed from."""
        if self.make_keys is None:
            raise ValueError("This view carries no keys.")
        return self.make_keys()
