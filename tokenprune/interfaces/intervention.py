"""The class that an intervention derives from, and what it is given.

An intervention changes attention inside decoder layers; no token leaves. At the layers that it names, it may note facts
on the keys that a prompt adds (which ones are sinks, how salient they are), and it may replace the attention output of
the rows that it names. Facts travel with the KV cache: through pruning, beams, further turns and copies. Nothing here
needs the attention matrix; a layer keeps its fast attention for all other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

Facts = Mapping[str, Tensor]
"""By name, `[B, P]`: what an intervention noted on the first P keys of a layer; later keys are later tokens."""


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
class Entering:
    """New tokens of a prompt that enter a layer, before any stage cuts at that layer.

    Attributes:
        layer: which, from 0.
        hidden: `[B, S, D]`, the residual stream before the layer's norm.
        visual: `[B, S]` bool, True at visual tokens, separators of pictures included.
        attended: `[B, S]` bool, False at padding; None: there is none.
        first: whether the cache was empty before.
        pictures: computes `[B]` int64, a number for the pictures of each sample, the same for the same pixels.
    """

    layer: int
    hidden: Tensor
    visual: Tensor
    attended: Tensor | None
    first: bool
    pictures: Callable[[], Tensor]


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
        real: `[B, R]` bool, False at places filled up because samples differ in their number of rows; None: all are
            real.
        prompt: whether the rows are of a prompt that facts were noted on in this call; False for decoded tokens and
            for text that was added later.
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


@dataclass
class Intervention:
    """A change of attention. Options are dataclass fields.

    Attributes:
        layers: decoder layers in which it acts, from 0; None is the intervention's default, [] switches it off.
    """

    name: ClassVar[str] = ""
    published: ClassVar[str] = ""
    """Paper, arXiv number and official code, for tables."""
    visual_only: ClassVar[bool] = True
    """Whether it changes nothing where a prompt has no picture."""

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

    def rows(self, visual: Tensor, attended: Tensor, before: Tensor) -> Tensor:
        """`[B, S]` bool on the CPU: query rows of a prompt whose output it may replace; in later calls it is asked
        about all rows. By default text after a visual token.

        Args:
            visual, attended: `[B, S]` bool on the CPU, as laid out, before any cut. Visual rows may have left by the
                time of a layer, so only text rows can be asked for.
            before: `[B]` bool on the CPU, whether the cache has visual tokens from earlier turns.
        """
        return attended & ~visual & ((visual.cumsum(1) > 0) | before[:, None])

    def note(self, entering: Entering) -> dict[str, Tensor]:
        """Facts on the new tokens, `[B, S]` each; the same names in every layer of a prompt."""
        return {}

    def applies(self, facts: Facts) -> Tensor:
        """`[B]` bool: samples in which this layer's attention is changed at all; others keep the stock output."""
        first = next(iter(facts.values()))
        return torch.ones(first.shape[0], dtype=torch.bool, device=first.device)

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
