"""The one class a method derives from, and the view of a prompt that it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from tokenprune.interfaces.budget import AVERAGE, Budget
from tokenprune.interfaces.search_space import Choice, Range
from tokenprune.interfaces.selection import Selection, topk_indices
from tokenprune.interfaces.signals import Signal, TowerInfo
from tokenprune.interfaces.site import read_site
from tokenprune.interfaces.view import View
from tokenprune.interfaces.visual import Raster


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
            method's `default_scope`. Later cuts rank the visual together.
        key_bias: for methods that merge: in the decoder's attention a token that stands for b (`Selection.sizes`)
            weighs as much as b tokens alike would, by log b on the logits of its key, in prompts and while decoding.
            None is the method's `default_key_bias`.
    """

    name: ClassVar[str] = ""
    site: ClassVar[str] = "input"
    """Where it acts unless told otherwise, see `tokenprune.interfaces.site`."""
    default_scope: ClassVar[str] = "raster"
    needs_grid: ClassVar[bool] = False
    """Whether it works on a single grid of tokens only."""
    published_positions: ClassVar[str] = "compact"
    hints: ClassVar[tuple[str, ...]] = ()
    """Names of the hints that the method cannot do without."""
    token_hints: ClassVar[tuple[str, ...]] = ()
    """Those hints that are a number for each token of a visual, before any cut: a view has the numbers of its own
    tokens, `[N]` fp32 each."""
    hint_sources: ClassVar[Mapping[str, str]] = {}
    """By hint, a sentence that says who gave none how to get it."""
    merges: ClassVar[bool] = False
    """Whether it puts other embeddings at the kept places, such as means of several tokens."""
    default_key_bias: ClassVar[bool] = False
    says_sizes: ClassVar[bool] = True
    """Whether a method that merges says how many tokens each kept one stands for; one that mixes a token into several
    cannot."""
    adaptive: ClassVar[bool] = False
    """Whether the method itself decides how many stay, see `is_adaptive`."""
    cuts_pixels: ClassVar[bool] = False
    """Only at the site "pixels": whether patches leave before the first block of the vision tower, by a `select` that
    sees their pixels, rather than that the tower is given a smaller picture, see `target_grid`."""
    plan_options: ClassVar[tuple[str, ...]] = ()
    """Options that only `stages` reads: where the user names the site (`at`), they have no effect and are refused."""
    published: ClassVar[str] = ""
    """Paper, arXiv number and official code, for tables."""
    reproduces: ClassVar[str] = ""
    """The published number that it should give: model, budget, metric and where it stands; "" where none is known."""
    text_aware: ClassVar[bool] = False
    """Whether the words of the prompt decide which tokens stay."""
    processor_options: ClassVar[Mapping[str, str]] = {}
    """Options whose value an image processor knows, by the name of its attribute: what runs with a processor at hand
    may set them."""

    positions: str | None = None
    scope: str | None = None
    key_bias: bool | None = None

    def __post_init__(self) -> None:
        if self.key_bias not in (None, True, False):
            raise ValueError(f"key_bias must be true or false, got {self.key_bias!r}.")
        if self.key_bias and (not self.is_merging or self.site == "pixels"):
            raise ValueError(
                f"key_bias=True weighs a key by how many tokens were merged into it, and {self.name} merges none of "
                "the decoder's tokens. Leave key_bias out."
            )
        if self.key_bias and not self.says_sizes:
            raise ValueError(
                f"key_bias=True weighs a key by how many tokens it stands for, and {self.name} mixes a token into "
                "several, so none stands for a number of them. Leave key_bias out."
            )
        if self.scope not in (None, "raster", "visual"):
            raise ValueError(f"scope must be 'raster' or 'visual', got {self.scope!r}.")
        if self.scope == "visual" and self.needs_grid:
            raise ValueError(f"{self.name} works on a grid of tokens, so it cannot rank a visual together.")
        if self.positions not in (None, "compact", "keep"):
            raise ValueError(f"positions must be 'compact' or 'keep', got {self.positions!r}.")

    @property
    def biases_keys(self) -> bool:
        """Whether keys of its tokens are weighed by `Selection.sizes`."""
        return self.default_key_bias if self.key_bias is None else bool(self.key_bias)

    @property
    def is_merging(self) -> bool:
        """Whether these options put other embeddings at the kept places."""
        return self.merges

    @property
    def own_positions(self) -> str:
        """The published policy of position ids, with these options."""
        return self.published_positions

    @property
    def is_random(self) -> bool:
        """Whether what stays depends on a seed, the option `seed`."""
        return hasattr(self, "seed")

    @property
    def files(self) -> tuple[Path, ...]:
        """Files of weights that decide what stays: with others under the same names, answers are other ones."""
        return ()

    @property
    def needed_hints(self) -> tuple[str, ...]:
        """Hints that it cannot do without with these options."""
        return self.hints

    @property
    def is_adaptive(self) -> bool:
        """Whether these options decide how many stay: the method is then asked also where the budget would keep all."""
        return self.adaptive

    def stages(self, budget: Budget, depths: ModelDepths) -> tuple[Stage, ...]:
        """The cuts that make up the method, for a model of these depths; one cut at `site` by default."""
        return (Stage(self.site, self, budget),)

    def stage_at(self, site: str, budget: Budget) -> Stage:
        """The one cut at a site that the user named (`at`)."""
        return Stage(site, self, budget)

    @classmethod
    def search_space(cls, mean: float, depths: ModelDepths) -> Mapping[str, Range | Choice]:
        """Options that `tokenprune tune` searches, by name; empty for a method without any.

        Args:
            mean: the budget, visual tokens averaged over the decoder's layers as a kept fraction in (0, 1].
            depths: of the model.
        """
        return {}

    @classmethod
    def tuned(cls, values: Mapping[str, Any], mean: float, depths: ModelDepths) -> dict[str, Any] | None:
        """The method with these values of its search space at that budget, as a mapping that `apply` takes; None where
        they cannot keep to it. By default the method's cuts are solved for the mean, whatever the values are."""
        return {"method": cls.name, "keep": f"{AVERAGE}{mean}", **values}

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        """Signals to record, for a given tower. Raise ValueError where the method cannot work on it."""
        return ()

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        """Signals for one cut, at "pixels", "vision" (after block `depth`), "input" or "layer" (`depth` is K); those of
        `signals` unless the method reads what is near its cut."""
        return self.signals(tower)

    def notes(self, tower: TowerInfo) -> tuple[str, ...]:
        """What a reader of results must know of this method on this tower, for example a stand-in for a signal."""
        return ()

    def kept_tokens(self, num_tokens: int, budget: Budget) -> int:
        """How many of an image's N tokens a cut leaves, as far as that is known beforehand."""
        return budget.tokens(num_tokens)

    def exact_tokens(self, rasters: Sequence[Raster], budget: int) -> int:
        """How many tokens stay where `budget` of those of `rasters`, which are whole, are asked for: what decides by
        the grid and not by the picture says its number. Of a method that is not adaptive, see `is_adaptive`."""
        return budget

    def score(self, view: View) -> Tensor:
        """Importance of each visual token, `[M, N]`; higher means keep."""
        raise TypeError(f"{type(self).__name__} defines neither score() nor select().")

    def select(self, view: View) -> Selection:
        """Keep the `view.budget` tokens with the highest score; ties go to the lower raster index."""
        scores = self.score(view)
        wanted = (view.num_images, view.num_tokens)
        if not isinstance(scores, Tensor) or tuple(scores.shape) != wanted:
            came = f"a tensor {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise TypeError(
                f"{type(self).__name__}.score must return one number for each visual token, a tensor {wanted} (images, "
                f"tokens); it returned {came}."
            )
        return Selection(topk_indices(scores, view.budget))

    def target_grid(self, grid: tuple[int, int], budget: int) -> tuple[int, int]:
        """Only at the site "pixels": (rows, cols) of the visual tokens that the tower shall make of a picture that
        would give `grid`; rows * cols <= budget."""
        raise TypeError(f"{type(self).__name__} acts at {self.site!r} and resizes no picture.")

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        """Floating-point operations of one `select` (2 per multiply-add), matrix products only: what torch's
        FlopCounterMode counts. Signals are counted apart."""
        return 0


@dataclass(frozen=True)
class Stage:
    """One cut.

    Attributes:
        site: see `tokenprune.interfaces.site`.
        pruner: what chooses.
        budget: tokens that each image or video keeps; a fraction is of its tokens before any cut.
    """

    site: str
    pruner: Pruner
    budget: Budget

    @property
    def place(self) -> str:
        """The site without its number: "pixels", "vision", "input" or "layer"."""
        return read_site(self.site).place

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        """What the pruner wants recorded for this cut."""
        return self.pruner.signals_at(tower, self.place, self.depth)

    @property
    def depth(self) -> int:
        """L of "vision:L" or K of "layer:K"; 0 elsewhere."""
        return read_site(self.site).depth or 0

    @property
    def after_block(self) -> int | None:
        """The block of the vision tower behind which tokens leave: L of "vision:L", and -1, before the first one, at
        "pixels"; None where none leave there."""
        if self.place == "pixels":
            return -1 if self.pruner.cuts_pixels else None
        return self.depth if self.place == "vision" else None


@dataclass(frozen=True)
class ModelDepths:
    """What a plan is made for.

    Attributes:
        vision: blocks of the vision tower.
        feature: the block whose output becomes the visual tokens; None where the tower cannot be cut.
        decoder: decoder layers.
        first_cut: lowest K of "layer:K" (0 cuts at the input of the first layer).
        resizable: whether the vision tower takes pictures of other sizes.
        one_size: whether all images have the same number of visual tokens, and few: no crops, no native sizes.
        merges_inside: whether the vision tower takes merged states in place of its own, between two blocks.
    """

    vision: int
    feature: int | None
    decoder: int
    first_cut: int = 1
    resizable: bool = False
    one_size: bool = True
    merges_inside: bool = True
