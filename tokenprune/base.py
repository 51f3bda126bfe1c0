"""The one class a method derives from, and the view of a prompt that it gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from tokenprune.selection import Selection, topk_indices
from tokenprune.signals import Signal, Tower


@dataclass
class View:
    """What a method sees: M images of one shape, from one batch of prompts.

    The engine groups the images of a batch by shape and budget, so a method never meets padding or ragged rows.

    Attributes:
        features: `[M, N, D]` visual embeddings as the LLM would get them (after the projector).
        grid: (rows, cols) of the raster the N tokens stand in; rows * cols == N.
        budget: k, how many of the N tokens to keep, 1 <= k < N.
        tower: facts on the vision tower.
        signals: recorded tensors by request.
        hints: what the caller knows of each image (see `Handle.hints`): name -> one value per image, length M.
        make_keys: computes `keys`.
    """

    features: Tensor
    grid: tuple[int, int]
    budget: int
    tower: Tower
    signals: Mapping[Signal, Tensor] = field(default_factory=dict)
    hints: Mapping[str, list[Any]] = field(default_factory=dict)
    make_keys: Callable[[], Tensor] | None = None

    @property
    def num_images(self) -> int:
        """M."""
        return self.features.shape[0]

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.features.shape[1]

    def signal(self, name: str, layer: int) -> Tensor:
        """The signal that the method asked for in `signals()`, `[M, N]` fp32."""
        try:
            return self.signals[Signal(name, layer)]
        except KeyError:
            asked = ", ".join(f"{signal.name} of block {signal.layer}" for signal in self.signals) or "nothing"
            raise KeyError(f"{name} of block {layer} was not recorded; signals() asked for {asked}.") from None

    def keys(self) -> Tensor:
        """`[M]` int64, one number per image that depends on its pixels, its prompt and its place among the prompt's
        images, and not on the batch it came in: what a random method derives its seed from."""
        if self.make_keys is None:
            raise ValueError("This view carries no keys.")
        return self.make_keys()


@dataclass
class Pruner:
    """A method: signals and a budget go in, a selection comes out.

    Write `score` (higher means keep), or `select` for anything that is no ranking. Options are dataclass fields.

    Attributes:
        positions: "compact" renumbers what stays without gaps, "keep" leaves every token its original position id.
            Each method's default is its published one.
    """

    name: ClassVar[str] = ""
    site: ClassVar[str] = "input"
    """Where it acts: "input" (after the projector, before the LLM) or "pixels" (before the vision tower)."""
    hints: ClassVar[tuple[str, ...]] = ()
    """Names of the hints that the method cannot do without."""
    merges: ClassVar[bool] = False
    """Whether other embeddings than the tokens' own stand at the kept places."""
    text_aware: ClassVar[bool] = False
    published: ClassVar[str] = ""
    """Paper, arXiv number and official code, for tables."""

    positions: str = "compact"

    def __post_init__(self) -> None:
        if self.positions not in ("compact", "keep"):
            raise ValueError(f"positions must be 'compact' or 'keep', got {self.positions!r}.")

    def signals(self, tower: Tower) -> tuple[Signal, ...]:
        """Signals to record, for a given tower. Raise ValueError where the method cannot work on it."""
        return ()

    def score(self, view: View) -> Tensor:
        """Importance of each visual token, `[M, N]`; higher means keep."""
        raise TypeError(f"{type(self).__name__} defines neither score() nor select().")

    def select(self, view: View) -> Selection:
        """Keep the `view.budget` tokens with the highest score; ties go to the lower raster index."""
        return Selection(topk_indices(self.score(view), view.budget))

    def target_grid(self, grid: tuple[int, int], budget: int) -> tuple[int, int]:
        """Only at the site "pixels": (rows, cols) of the visual tokens that the tower shall make of a picture that
        would give `grid`; rows * cols <= budget."""
        raise TypeError(f"{type(self).__name__} acts at {self.site!r} and resizes no picture.")

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: Tower) -> int:
        """Floating-point operations of one `select` (2 per multiply-add), matrix products only: what torch's
        FlopCounterMode counts. Signals are counted apart."""
        return 0
