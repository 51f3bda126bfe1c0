"""What becomes of one batch of prompts: which visual tokens are still there, and where they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenprune.interfaces.intervention import Facts
from tokenprune.interfaces.visual import TowerWork
from tokenprune.state.compaction import Compaction, plan_compaction
from tokenprune.state.device_timer import DeviceTimer
from tokenprune.state.prompt_layout import Layout, Span
from tokenprune.state.tower_recording import Recording


@dataclass
class KeptTokens:
    """The tokens of one visual that are still in its row.

    Attributes:
        tokens: `[n]` int64, which of its tokens; None while all are there.
        count: n, known on the host.
        places: `[n]` int64, where they stand in the row now.
        placeholders: `[P]` int64, where all of its placeholders stand, separators included; None after its first cut.
        carry: name -> `[n]`, what an earlier stage left with them.
        sizes: `[n]` fp32, how many tokens each weighs as in attention; None while each stands for itself.
    """

    tokens: Tensor | None
    count: int
    places: Tensor
    placeholders: Tensor | None
    carry: dict[str, Tensor] = field(default_factory=dict)
    sizes: Tensor | None = None


@dataclass(frozen=True)
class Cut:
    """What one site left.

    Attributes:
        site: where.
        counts: tokens left of each span.
        lengths: attended tokens left of each row.
        tokens: which tokens are left of each span, `[n]` int64; None where all are.
        sizes: how many tokens those of each span weigh as in attention from here on, `[n]` fp32; None where each stands
            for itself.
    """

    site: str
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: tuple[Tensor | None, ...]
    sizes: tuple[Tensor | None, ...]


@dataclass
class Prompt:
    """One batch of prompts.

    Attributes:
        layout: where its visual tokens were.
        sources: recording and row of each span.
        lengths: attended tokens of each row before pruning.
        pad_left: whether padding stands on the left.
        attended: `[B, S]` bool on the CPU, False at padding, before pruning; None where no mask was given.
        alive: for each span, what is still there.
        cuts: what each site left, in the order in which they ran; empty where nothing left.
        timer: time of signals and selection.
        flops: matrix products of methods and signals, all sites together.
        merged: `[]` each, how many tokens went into kept ones, by visual and stage.
        tower: what the vision tower was given, for each of its runs.
        noted: for each intervention, what it noted on keys, by layer.
        attention_flops: by decoder layer, matrix products of interventions beside the layer's own attention; below 0
            where they save some; None where that is not modelled.
        held: by decoder layer, where a cache policy acts or something else took keys out of the cache: keys of each row
            that the next step reads, and that are stored.
        drafted: tokens at the end of each row that a draft proposed.
        raters: for each span, `[T]` bool, which tokens of the text behind the row's last visual token rate it; empty
            where no stage asks.
    """

    layout: Layout
    sources: list[tuple[Recording, int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    pad_left: bool = True
    attended: Tensor | None = None
    alive: list[KeptTokens] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    timer: DeviceTimer = field(default_factory=DeviceTimer)
    flops: int = 0
    merged: list[Tensor] = field(default_factory=list)
    tower: list[TowerWork] = field(default_factory=list)
    noted: list[dict[int, Facts]] = field(default_factory=list)
    attention_flops: dict[int, int | None] = field(default_factory=dict)
    held: dict[int, tuple[list[int], list[int]]] = field(default_factory=dict)
    drafted: int = 0
    raters: list[Tensor] = field(default_factory=list)

    @property
    def lengths_now(self) -> list[int]:
        """Attended tokens of each row after the cuts so far."""
        return list(self.cuts[-1].lengths) if self.cuts else list(self.lengths)

    @property
    def recordings(self) -> list[Recording]:
        """Runs of the vision tower behind the prompt, each once."""
        return list({id(recording): recording for recording, _ in self.sources}.values())

    def text_after_visual(self) -> list[int]:
        """For each row, tokens after its last visual token, padding not counted; 0 for a row without visuals."""
        counts = [0] * self.layout.batch_size
        for span in self.layout.spans:  # row by row and left to right, so the last of a row counts
            after = int(span.places[-1]) + 1
            text = self.layout.length - after
            if self.attended is not None:
                text = int(self.attended[span.sample, after:].sum())
            counts[span.sample] = text - self.drafted
        return counts

    def place_of(self, index: int) -> int:
        """Which visual of the batch, as the caller handed them in, span `index` shows: beams show the same ones again,
        and a recording counts pictures and videos apart."""
        seen = dict.fromkeys((id(recording), row) for recording, row in self.sources)
        recording, row = self.sources[index]
        return list(seen).index((id(recording), row))

    def text_before_visual(self) -> bool:
        """Whether some visual token of a row comes after text that follows another one."""
        reach: dict[int, tuple[int, int]] = {}  # by row: where its first visual starts, and visual tokens from there
        for span in self.layout.spans:
            first, count = reach.get(span.sample, (int(span.places[0]), 0))
            reach[span.sample] = first, count + len(span.places)
            if int(span.places[-1]) - first + 1 > count + len(span.places):
                return True
        return False

    def picture_keys(self) -> Tensor:
        """`[B]` int64 on the CPU: a number for the pictures of each row, the same for the same pixels."""
        keys = torch.zeros(self.layout.batch_size, dtype=torch.int64)
        for span, (recording, row) in zip(self.layout.spans, self.sources):
            keys[span.sample] = keys[span.sample] * 31 + recording.pixel_key(row).cpu()
        return keys

    def place(self, device: torch.device) -> None:
        """Put every span where the processor laid it."""
        self.alive = [_whole(span, device) for span in self.layout.spans]


def _whole(span: Span, device: torch.device) -> KeptTokens:
    placeholders = span.places.to(device)
    offsets = span.visual.offsets
    places = placeholders if offsets is None else placeholders[offsets.to(device)]
    return KeptTokens(None, span.num_tokens, places, placeholders)


def multiplied_sizes(had: Tensor | None, chosen: Tensor, sizes: Tensor | None) -> Tensor | None:
    """`[k]`: what the tokens at `chosen` `[k]` weigh that weighed `had` `[n]` before, and `sizes` `[k]` times as much
    now; None is one each."""
    if had is None:
        return sizes
    return had[chosen] if sizes is None else had[chosen] * sizes


class CutBuilder:
    """Collects what leaves the rows `[B, S]` at one site, and moves what stays.

    Args:
        prompt: brought up to date by `compact`.
        site: where.
        length: S.
    """

    def __init__(self, prompt: Prompt, site: str, length: int) -> None:
        self._prompt, self._site, self._length = prompt, site, length
        self._lengths = prompt.lengths_now
        self._gone: list[tuple[int, Tensor]] = []
        self._kept: dict[int, tuple[int, Tensor]] = {}  # by span: a second stage here may cut a span again

    def keep(self, index: int, chosen: Tensor, carry: dict[str, Tensor], sizes: Tensor | None = None) -> Tensor:
        """Of the present tokens of span `index`, keep those at `chosen` `[k]` int64 (increasing); all others leave,
        separators with them. Each then weighs `sizes` `[k]` times as much as it did. Returns the places of the kept
        ones."""
        alive, span = self._prompt.alive[index], self._prompt.layout.spans[index]
        leaves_whole = alive.placeholders is not None
        before = span.visual.length if leaves_whole else alive.count
        count = chosen.shape[0]
        self._gone.append((span.sample, alive.placeholders if alive.placeholders is not None else alive.places))
        places = alive.places[chosen]
        self._kept[index] = (span.sample, places)
        self._lengths[span.sample] -= before - count
        tokens = chosen if alive.tokens is None else alive.tokens[chosen]
        sizes = multiplied_sizes(alive.sizes, chosen, sizes)
        self._prompt.alive[index] = KeptTokens(
            tokens, count, places, None, {name: v[chosen] for name, v in carry.items()}, sizes
        )
        return places

    def gone(self, batch_size: int) -> Tensor | None:
        """`[B, S]` bool: places that leave, so far; None if none do."""
        if not self._gone:
            return None
        gone = torch.zeros(batch_size, self._length, dtype=torch.bool, device=self._gone[0][1].device)
        gone[_pairs(self._gone)] = True
        gone[_pairs(list(self._kept.values()))] = False
        return gone

    def compact(self, attended: Tensor | None, batch_size: int) -> Compaction | None:
        """Plan the move and note the cut; None if nothing left.

        Args:
            attended: `[B, S]` bool, False at padding; None means no padding.
        """
        prompt = self._prompt
        gone = self.gone(batch_size)
        if gone is None:
            return None
        if min(self._lengths) < 1:
            row = self._lengths.index(min(self._lengths))
            raise ValueError(
                f"Every token of row {row} would leave at {self._site!r}: this prompt is pictures alone, and the "
                "method keeps nothing of them. Add text, or keep some of their tokens."
            )
        tails = [0 if prompt.pad_left else int(count < prompt.layout.length) for count in prompt.lengths]
        plan = plan_compaction(~gone, attended, self._lengths, prompt.pad_left, tails)
        for span, alive in zip(prompt.layout.spans, prompt.alive):
            alive.places = plan.target[span.sample][alive.places]
            if alive.placeholders is not None:
                alive.placeholders = plan.target[span.sample][alive.placeholders]
        counts = tuple(alive.count for alive in prompt.alive)
        tokens = tuple(alive.tokens for alive in prompt.alive)
        sizes = tuple(alive.sizes for alive in prompt.alive)
        prompt.cuts.append(Cut(self._site, counts, tuple(self._lengths), tokens, sizes))
        return plan


def _pairs(entries: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    places = torch.cat([part for _, part in entries])
    rows = [torch.full_like(part, sample) for sample, part in entries]
    return torch.cat(rows), places
