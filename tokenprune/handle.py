"""What `apply` gives back: the way to look at the last prompt, and the way out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune.base import Pruner
from tokenprune.engine import Engine
from tokenprune.intervention import Intervention
from tokenprune.ledger import Ledger
from tokenprune.prompt import Prompt
from tokenprune.report import Report, make_report, visual_by_layer


class Handle:
    """A method at work on a model.

    Attributes:
        model: the wrapped model, the very object that was passed in.
        stages: the cuts, in the order in which they run; none where attention is changed only.
        interventions: what changes attention, as it stands on this model.
        adapter: the description of the model's family.
        label: the method with its budget, for tables.
    """

    def __init__(self, model: Any, engine: Engine, ledger: Ledger, label: str) -> None:
        self.model = model
        self.stages = engine.stages
        self.interventions = engine.attending.interventions
        self.adapter = engine.adapter
        self.label = label
        self._engine = engine
        self._ledger = ledger

    @property
    def method(self) -> Pruner | Intervention:
        """The method object of the first stage; the first intervention where nothing prunes."""
        return self.stages[0].pruner if self.stages else self.interventions[0]

    def __repr__(self) -> str:
        state = "applied" if len(self._ledger) else "removed"
        return f"Handle({self.label} on {type(self.model).__name__}, {state})"

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the model back as it was: same objects, same outputs bit for bit. A second call does nothing."""
        self._ledger.undo()

    def set_hints(self, **hints: list[Any]) -> None:
        """Tell the method what it cannot see, one value per image or video in batch order; holds until set again.

        Args:
            hints: for example `boxes=[...]` for the oracle of the pocket suite.

        Raises:
            ValueError: the method uses no such hint.
        """
        used = sorted({name for stage in self.stages for name in stage.pruner.hints})
        for name in hints:
            if name not in used:
                raise ValueError(f"{self.label} uses no hint {name!r}; it uses: {', '.join(used) or 'none'}.")
        self._engine.hints.update(hints)

    @property
    def kept(self) -> list[list[Tensor]]:
        """Visual tokens of the last batch of prompts that reached the end of the decoder: for each sample, for each of
        its images and videos, the indices in that visual's own raster order (crops or frames one after the other),
        sorted, `[k]` int64 on the CPU.

        Raises:
            RuntimeError: no prompt has run yet.
        """
        prompt = self._last()
        kept: list[list[Tensor]] = [[] for _ in range(prompt.layout.batch_size)]
        for span, alive in zip(prompt.layout.spans, prompt.alive):
            kept[span.sample].append(torch.arange(span.num_tokens) if alive.tokens is None else alive.tokens.cpu())
        return kept

    @property
    def visual_by_layer(self) -> list[list[int]]:
        """For each sample of the last batch of prompts, its visual tokens in every decoder layer.

        Raises:
            RuntimeError: no prompt has run yet.
        """
        return visual_by_layer(self._last(), len(self.adapter.layers))

    @property
    def stays(self) -> Tensor:
        """`[B, S]` bool on the CPU: which places of the last batch of prompts reached the end of the decoder, text and
        padding among them.

        Raises:
            RuntimeError: no prompt has run yet.
        """
        prompt = self._last()
        stays = torch.ones(prompt.layout.batch_size, prompt.layout.length, dtype=torch.bool)
        for span, alive in zip(prompt.layout.spans, prompt.alive):
            if alive.tokens is not None:
                places = span.places if span.visual.offsets is None else span.places[span.visual.offsets]
                stays[span.sample, span.places] = False
                stays[span.sample, places[alive.tokens.cpu()]] = True
        return stays

    @property
    def kept_at(self) -> dict[str, list[list[Tensor]]]:
        """As `kept`, after each site at which something left, in the order in which they ran."""
        prompt = self._last()
        found: dict[str, list[list[Tensor]]] = {}
        for cut in prompt.cuts:
            rows: list[list[Tensor]] = [[] for _ in range(prompt.layout.batch_size)]
            for span, tokens in zip(prompt.layout.spans, cut.tokens):
                rows[span.sample].append(torch.arange(span.num_tokens) if tokens is None else tokens.cpu())
            found[cut.site] = rows
        return found

    def _last(self) -> Prompt:
        if self._engine.last is None:
            raise RuntimeError("No prompt has run since the method was applied; call model.generate(...) first.")
        return self._engine.last

    def report(self) -> Report:
        """Tokens, FLOPs, KV bytes and selection time of the last batch of prompts.

        Raises:
            RuntimeError: no prompt has run yet.
        """
        return make_report(self._last(), self.label, self.stages, self.adapter, self._engine.attending)
