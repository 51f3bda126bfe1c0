"""A batch of prompts that ran, as a caller reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenprune.interfaces.site import read_site
from tokenprune.report import Report, make_report, visual_by_layer

if TYPE_CHECKING:
    from tokenprune.engine.engine import Engine
    from tokenprune.interfaces.intervention import Facts
    from tokenprune.interfaces.visual import TowerWork
    from tokenprune.state.prompt_layout import Layout
    from tokenprune.state.prompt_state import Cut, Prompt


class PromptView:
    """One batch of prompts: what was kept, and what it cost.

    Args:
        prompt: the prompts.
        engine: what pruned them.
        label: the method with its budget, for tables.
    """

    def __init__(self, prompt: Prompt, engine: Engine, label: str) -> None:
        self._prompt, self._engine, self._label = prompt, engine, label

    @property
    def layout(self) -> Layout:
        """Where the visual tokens stood in the rows before anything left: a span for each image or video."""
        return self._prompt.layout

    @property
    def lengths(self) -> tuple[int, ...]:
        """Text and visual tokens of each row before anything left, padding not counted."""
        return tuple(self._prompt.lengths)

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """What each site left, in the order in which they ran: tokens by span of `layout`, and lengths of the rows.
        What left inside the vision tower leaves the rows at the input."""
        return tuple(self._prompt.cuts)

    @property
    def tower(self) -> tuple[TowerWork, ...]:
        """What the vision tower worked on, for each of its runs, with the cuts inside it."""
        return tuple(self._prompt.tower)

    @property
    def noted(self) -> tuple[dict[int, Facts], ...]:
        """For each intervention, what it noted on the prompt's keys, by decoder layer."""
        return tuple(dict(facts) for facts in self._prompt.noted)

    @property
    def kept(self) -> list[list[Tensor]]:
        """See `Handle.kept`."""
        prompt = self._prompt
        kept: list[list[Tensor]] = [[] for _ in range(prompt.layout.batch_size)]
        for span, alive in zip(prompt.layout.spans, prompt.alive):
            kept[span.sample].append(torch.arange(span.num_tokens) if alive.tokens is None else alive.tokens.cpu())
        return kept

    @property
    def visual_by_layer(self) -> list[list[int]]:
        """See `Handle.visual_by_layer`."""
        return visual_by_layer(self._prompt, len(self._engine.adapter.layers))

    @property
    def stays(self) -> Tensor:
        """See `Handle.stays`."""
        return self._places([alive.tokens for alive in self._prompt.alive])

    @property
    def stays_by_layer(self) -> dict[int, Tensor]:
        """See `Handle.stays_by_layer`."""
        prompt = self._prompt
        by_layer = {0: self._places([None] * len(prompt.layout.spans))}
        for cut in prompt.cuts:
            site = read_site(cut.site)
            by_layer[(site.depth or 0) if site.place == "layer" else 0] = self._places(cut.tokens)
        return by_layer

    def _places(self, tokens: Sequence[Tensor | None]) -> Tensor:
        """`[B, S]` bool: places of the rows where these tokens of each span are left, None for all, and nothing else of
        their spans."""
        prompt = self._prompt
        stays = torch.ones(prompt.layout.batch_size, prompt.layout.length, dtype=torch.bool)
        for span, left in zip(prompt.layout.spans, tokens):
            if left is not None:
                places = span.places if span.visual.offsets is None else span.places[span.visual.offsets]
                stays[span.sample, span.places] = False
                stays[span.sample, places[left.cpu()]] = True
        return stays

    @property
    def kept_at(self) -> dict[str, list[list[Tensor]]]:
        """See `Handle.kept_at`."""
        prompt = self._prompt
        by_site: dict[str, list[list[Tensor]]] = {}
        for cut in prompt.cuts:
            rows: list[list[Tensor]] = [[] for _ in range(prompt.layout.batch_size)]
            for span, tokens in zip(prompt.layout.spans, cut.tokens):
                rows[span.sample].append(torch.arange(span.num_tokens) if tokens is None else tokens.cpu())
            by_site[cut.site] = rows
        return by_site

    def report(self) -> Report:
        """Tokens, FLOPs, KV bytes and selection time."""
        engine = self._engine
        return make_report(self._prompt, self._label, engine.stages, engine.adapter, engine.attending)
