"""The one class a method derives from, and the view of a prompt that it gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from tokenprune.budget import AVERAGE, Budget
from tokenprune.layout import Raster
from tokenprune.search import Choice, Range
from tokenprune.selection import Selection, topk_indices
from tokenprune.signals import Signal, Tower
from tokenprune.stages import Depths, Stage


@dataclass
class View:
    """What a method sees: M images of one shape, from one batch of prompts.

    The engine groups the images of a batch by shape, count and budget, so a method never meets padding or ragged rows.
    What an "image" is follows from the method's `scope`: a single raster, or a whole image or video.

    Attributes:
        features: `[M, N, D]` the tokens that are still there: visual embeddings as the LLM would get them at "input",
            hidden states entering the layer at "layer:K", those after the block at "vision:L".
        rasters: the grids in which the tokens stood before any cut.
        budget: k, how many of the N tokens to keep, 1 <= k < N (at "layer:K" also 0).
        tower: facts on the vision tower.
        signals: recorded tensors by request.
        hints: what the caller knows of each image (see `Handle.set_hints`): name -> one value per image, length M.
        make_keys: computes `keys`.
        site: where this cut is, for example "input" or "layer:9".
        tokens: `[M, N]` int64, which of the tokens of the rasters these are; None while all are there.
        carry: `[M, N]` tensors that an earlier stage of this prompt left with its tokens (`Selection.carry`).
    """

    features: Tensor
    rasters: tuple[Raster, ...]
    budget: int
    tower: Tower
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
    def num_images(self) -> int:
        """M."""
        return self.features.shape[0]

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.features.shape[1]

    def signal(self, name: str, layer: int, *settings: float) -> Tensor:
        """The signal that the method asked for in `signals()`, `[M, N]` fp32 (`[M]` for those of a whole prompt)."""
        try:
            return self.signals[Signal(name, layer, settings)]
        except KeyError:
            asked = ", ".join(f"{signal.name} of block {signal.layer}" for signal in self.signals) or "nothing"
            raise KeyError(f"{name} of block {layer} was not recorded; signals() asked for {asked}.") from None

    def keys(self) -> Tensor:
        """`[M]` int64, one number per image that depends on its pixels and on its place among the prompt's images,
        and not on the prompt's words or the batch it came in: what a random method derives its seed from."""
        if self.make_keys is None:
            raise ValueError("This view carries no keys.")
        return self.make_keys()


@dataclass
class Pruner:
    """A method: signals and a budget go in, a selection comes out.

    Write `score` (higher means keep), or `select` for anything that is no ranking. Options are dataclass fields.

    Attributes:
        positions: "compact" renumbers what stays without gaps, "keep" leaves every token its original position id.
            None is the published policy of the method; on families with 3-D positions (M-RoPE) it is "keep", because
            gaps in those ids are not counts of tokens.
        scope: what it ranks at a time while a visual is whole: "raster" (each crop, frame or image alone, its share of
            the budget in proportion to its size) or "visual" (all tokens of an image or video together). None is the
            method's own. Later cuts rank the visual together.
    """

    name: ClassVar[str] = ""
    site: ClassVar[str] = "input"
    """Where it acts unless told otherwise, see `tokenprune.stages`."""
    default_scope: ClassVar[str] = "raster"
    needs_grid: ClassVar[bool] = False
    """Whether it works on a single grid of tokens only."""
    published_positions: ClassVar[str] = "compact"
    hints: ClassVar[tuple[str, ...]] = ()
    """Names of the hints that the method cannot do without."""
    merges: ClassVar[bool] = False
    """Whether other embeddings than the tokens' own stand at the kept places."""
    adaptive: ClassVar[bool] = False
    """Whether the method itself decides how many stay: it is then asked also where the budget would keep all."""
    text_aware: ClassVar[bool] = False
    plan_options: ClassVar[tuple[str, ...]] = ()
    """Options that only `stages` reads: beside a site of the user's own (`at`) they would say nothing."""
    published: ClassVar[str] = ""
    """Paper, arXiv number and official code, for tables."""
    processor_options: ClassVar[Mapping[str, str]] = {}
    """Options whose value an image processor knows, by the name of its attribute: what runs with a processor at hand
    may set them."""

    positions: str | None = None
    scope: str | None = None

    def __post_init__(self) -> None:
        if self.scope not in (None, "raster", "visual"):
            raise ValueError(f"scope must be 'raster' or 'visual', got {self.scope!r}.")
        if self.scope == "visual" and self.needs_grid:
            raise ValueError(f"{self.name} works on a grid of tokens, so it cannot rank a visual together.")
        if self.positions not in (None, "compact", "keep"):
            raise ValueError(f"positions must be 'compact' or 'keep', got {self.positions!r}.")

    @property
    def draws(self) -> bool:
        """Whether what stays depends on a seed, the option `seed`."""
        return hasattr(self, "seed")

    def stages(self, budget: Budget, depths: Depths) -> tuple[Stage, ...]:
        """The cuts that make up the method, for a model of these depths; one cut at `site` by default."""
        return (Stage(self.site, self, budget),)

    def stage_at(self, site: str, budget: Budget) -> Stage:
        """The one cut at a site of the user's own (`at`)."""
        return Stage(site, self, budget)

    @classmethod
    def search_space(cls, mean: float, depths: Depths) -> Mapping[str, Range | Choice]:
        """Options that `tokenprune tune` searches, by name; empty for a method without any.

        Args:
            mean: the budget, visual tokens averaged over the decoder's layers as a kept fraction in (0, 1].
            depths: of the model.
        """
        return {}

    @classmethod
    def tuned(cls, values: Mapping[str, Any], mean: float, depths: Depths) -> dict[str, Any] | None:
        """The method with these values of its search space at that budget, as a mapping that `apply` takes; None where
        they cannot hold it. By default the method's cuts are solved for the mean, whatever the values are."""
        return {"method": cls.name, "keep": f"{AVERAGE}{mean}", **values}

    def signals(self, tower: Tower) -> tuple[Signal, ...]:
        """Signals to record, for a given tower. Raise ValueError where the method cannot work on it."""
        return ()

    def signals_at(self, tower: Tower, place: str, depth: int) -> tuple[Signal, ...]:
        """Signals for one cut, at "pixels", "vision" (after block `depth`), "input" or "layer" (`depth` is K); those of
        `signals` unless the method reads what is near its cut."""
        return self.signals(tower)

    def notes(self, tower: Tower) -> tuple[str, ...]:
        """What a reader of results must know of this method on this tower, for example a stand-in for a signal."""
        return ()

    def kept_tokens(self, num_tokens: int, budget: Budget) -> int:
        """How many of an image's N tokens a cut leaves, as far as that is known beforehand."""
        return budget.tokens(num_tokens)

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
