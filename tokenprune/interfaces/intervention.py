"""The class that an intervention derives from, and what it is given.

An intervention changes attention inside decoder layers; no token leaves. At the layers that it names, it may note facts
on the keys that a prompt adds (which ones are sinks, how salient they are), and it may replace the attention output of
the rows that it names. Facts travel with the KV cache: through pruning, beams, further turns and copies. Nothing here
needs the attention matrix; a layer keeps its fast attention for all other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from tokenprune.interfaces.signals import Signal, TowerInfo
from tokenprune.interfaces.visual import Raster

Facts = Mapping[str, Tensor]
"""By name, `[B, P, ...]`: what an intervention noted on the first P keys of a layer; later keys are later tokens."""

Carried = dict[str, Tensor]
"""By name, `[B, S, ...]`: what an intervention hands on from layer to layer within one call, by token as tokens stand;
cuts move it. It is of the call, so nothing of a prompt stands on the intervention."""


@dataclass(frozen=True)
class DecoderInfo:
    """What an intervention may know of a decoder.

    Attributes:
        family: name of the adapter.
        text: the decoder's model type, for example "qwen2".
        width: D, of the hidden states.
        layers: L.
        heads: query heads of a layer.
        key_heads: key heads of a layer.
    """

    family: str
    text: str
    width: int
    layers: int
    heads: int
    key_heads: int


@dataclass(frozen=True)
class VisualTokens:
    """One visual of a prompt.

    Attributes:
        sample: its row.
        rasters: its grids, over all of its N tokens.
        places: `[n]` int64, where those that are left stand in the row now.
        tokens: `[n]` int64, which of the N they are; None while all are there.
        signal: `[N]` fp32 of what `Intervention.signals` asked for.
    """

    sample: int
    rasters: tuple[Raster, ...]
    places: Tensor
    tokens: Tensor | None
    signal: Callable[[Signal], Tensor]


@dataclass(frozen=True)
class Entering:
    """New tokens of a prompt that enter a layer, before any stage cuts at that layer.

    Attributes:
        layer: which, from 0.
        hidden: `[B, S, D]`, the residual stream before the layer's norm.
        visual: `[B, S]` bool, True at visual tokens, separators of pictures included.
        attended: `[B, S]` bool, False at padding; None: there is none.
        first: whether the cache was empty before.
        pictures: computes `[B]` int64, a number for the pictures of each sample, the same for the same pixels.
        visuals: lists the visuals of this call.
        carried: what it handed on in earlier layers of this call; it may write here.
    """

    layer: int
    hidden: Tensor
    visual: Tensor
    attended: Tensor | None
    first: bool
    pictures: Callable[[], Tensor]
    visuals: Callable[[], Sequence[VisualTokens]] = tuple
    carried: Carried = field(default_factory=dict)


@dataclass(frozen=True)
class Attended:
    """Attention of some query rows in one layer.

    Where keys stand for several merged tokens, d is wider than a head by columns whose products are the bias of those
    keys' logits: what is computed from `query`, `key`, `value` and `scale` has it, and of the output the columns behind
    those of a head are dropped.

    Attributes:
        layer: which, from 0.
        query: `[B, H, R, d]`, rotated.
        key: `[B, Hk, K, d]`, rotated: the cache's keys and the new ones; query head h reads key head h // (H / Hk).
        value: `[B, Hk, K, d]`.
        allowed: `[B or 1, R, K]` bool, True where a row sees a key; None: every row sees all keys.
        scale: what the dot products are multiplied by.
        facts: what was noted on the first P <= K keys of this layer.
        made: a place for tables made of `facts` alone: they are there again in later calls, for as long as the facts
            stay what they are.
        real: `[B, R]` bool, False at padding, and at places filled up because samples differ in their number of rows;
            None: all are real. A row that is not real may see no key, and what it gets must be finite.
        prompt: whether the rows are of a prompt that facts were noted on in this call; False for decoded tokens and
            for text that was added later.
        whole: whether the rows are all rows of the call, in order.
        places: `[B, R]` int64, where the rows stand among the tokens of the call, in rising order; None where `whole`.
        drafted: how many tokens at the end of the call are no part of the prompt: proposed by a draft.
        carried: what it handed on in earlier layers of this call; `measure` may write here.
        stock: the layer's own attention, with its own mask, of all rows of the call: takes query, key and value as
            above, which may be wider by the same columns, and returns `[B, H, R, d]`. Where `whole`.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    allowed: Tensor | None
    scale: float
    facts: Facts
    real: Tensor | None
    prompt: bool
    whole: bool
    places: Tensor | None
    drafted: int
    carried: Carried
    stock: Callable[[Tensor, Tensor, Tensor], Tensor]
    made: dict[str, Any] = field(default_factory=dict)


@dataclass
class Intervention:
    """A change of attention. Options are dataclass fields.

    Attributes:
        layers: decoder layers in which it acts, from 0; None is the intervention's default, [] switches it off.
    """

    name: ClassVar[str] = ""
    published: ClassVar[str] = ""
    """Paper, arXiv number and official code, for tables."""
    acts_on: ClassVar[str] = "text behind a picture"
    """The query rows of a prompt that it changes, in words; decoded rows are changed by all."""
    answers_only: ClassVar[bool] = False
    """Whether of the rows that `rows` names it changes the last of a prompt alone, and those of drafted tokens, which
    are decoded early."""
    visual_only: ClassVar[bool] = True
    """Whether it changes nothing where a prompt has no picture."""

    widens_heads: ClassVar[bool] = False
    """Whether it calls `Attended.stock` with wider heads, which some kernels do not take."""

    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.layers is None:
            return
        numbers = list(self.layers) if isinstance(self.layers, Sequence) else [None]
        if any(isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 for layer in numbers):
            raise ValueError(f"layers must be a list of decoder layers from 0 on, got {self.layers!r}.")

    def default_layers(self, decoder: DecoderInfo) -> Sequence[int]:
        """Layers in which it acts unless told otherwise; [] for an intervention whose options switch it off."""
        return range(decoder.layers)

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that its options name and that decide what it does; a run's answers are of these."""
        return ()

    def prepare(self, decoder: DecoderInfo) -> tuple[int, ...]:
        """Get ready for a model; the layers in which it acts, in order.

        Raises:
            ValueError: a layer that the model does not have.
        """
        chosen = self.default_layers(decoder) if self.layers is None else self.layers
        for layer in chosen:
            if layer >= decoder.layers:
                raise ValueError(
                    f"{self.name} shall act in layer {layer}, and this decoder has layers 0 to {decoder.layers - 1}."
                )
        return tuple(sorted(set(chosen)))

    def check_cuts(self, layers: Sequence[int], cuts: Sequence[int]) -> None:
        """Check that options fit the stages that run together with it.

        Args:
            layers: what `prepare` returned.
            cuts: K of the stages at "layer:K".

        Raises:
            ValueError: an option has nothing to act on with these cuts.
        """

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        """What it reads of the vision tower, see `VisualTokens.signal`."""
        return ()

    def rows(self, visual: Tensor, attended: Tensor, before: Tensor) -> Tensor | None:
        """`[B, S]` bool on the CPU: query rows of a prompt whose output it may replace; None: all of them. In later
        calls it is asked about all rows. By default text after a visual token.

        Args:
            visual: `[B, S]` bool on the CPU, as laid out, before any cut. Visual rows may have left by the time of a
                layer, so text rows alone can be named.
            attended: `[B, S]` bool on the CPU, likewise: what is no padding.
            before: `[B]` bool on the CPU, whether the cache has visual tokens from earlier turns.
        """
        return attended & ~visual & ((visual.cumsum(1) > 0) | before[:, None])

    def note(self, entering: Entering) -> dict[str, Tensor]:
        """Facts on the new tokens, `[B, S, ...]` each; the same names in every layer of a prompt."""
        return {}

    def measures(self, layer: int) -> bool:
        """Whether `measure` is asked in this layer, one of those that `prepare` returned."""
        return False

    def measured_rows(self, visual: Tensor, attended: Tensor, before: Tensor) -> Tensor | None:
        """Query rows of a prompt that `measure` is given, as `rows` names them."""
        return self.rows(visual, attended, before)

    def measure(self, given: Attended) -> dict[str, Tensor]:
        """Facts on the new tokens of a prompt, `[B, S, ...]` each, from the layer's attention before it is changed:
        S are the last of `given.key`, as they stand. They stand beside those of `note`, under other names, before this
        layer attends. Later layers are handed what is written to `given.carried`."""
        return {}

    def measured_flops(self, given: Attended) -> int:
        """Matrix products of one `measure` (2 per multiply-add): by default the scores of the rows."""
        batch, heads, rows, width = given.query.shape
        return 2 * batch * heads * rows * given.key.shape[2] * width

    def applies(self, facts: Facts) -> Tensor | None:
        """`[B]` bool: samples in which this layer's attention is changed at all; others keep the stock output. None:
        all."""
        return None

    def attend(self, given: Attended) -> Tensor | None:
        """Attention output `[B, H, R, d]` of the rows, or None to leave the layer's output as it is."""
        raise TypeError(f"{type(self).__name__} defines no attend().")

    def kept_out(self, facts: Facts) -> tuple[Tensor, bool] | None:
        """Visual tokens that a stage at "layer:K" shall not rank: `[B, S]` bool, and whether they stay (outside its
        budget) or leave. None: it ranks all."""
        return None

    def flops(self, given: Attended) -> int:
        """Matrix products of one `attend` (2 per multiply-add): by default scores and output of the rows."""
        batch, heads, rows, width = given.query.shape
        return 4 * batch * heads * rows * given.key.shape[2] * width

    def summary(self, noted: Mapping[int, Facts]) -> str:
        """One line on what it did to the last prompt, from the facts by layer."""
        return ""

    @property
    def wants_prompts(self) -> int:
        """Prompts with pictures that it still has to see before it acts."""
        return 0

    def settled(self) -> Intervention:
        """A copy that needs to see no prompts, with what this one learned from those that it saw."""
        return replace(self)
