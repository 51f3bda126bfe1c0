"""What `apply` gives back: the way to look at the last prompt, and the way out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune.base import Pruner
from tokenprune.engine import Engine
from tokenprune.ledger import Ledger
from tokenprune.report import Report, make_report


class Handle:
    """A method at work on a model.

    Attributes:
        model: the wrapped model, the very object that was passed in.
        method: the method object.
        adapter: the description of the model's family.
    """

    def __init__(self, model: Any, engine: Engine, ledger: Ledger) -> None:
        self.model = model
        self.method: Pruner = engine.pruner
        self.adapter = engine.adapter
        self._engine = engine
        self._ledger = ledger

    def __repr__(self) -> str:
        state = "applied" if len(self._ledger) else "removed"
        return f"Handle({self.method.name}@{self._engine.budget} on {type(self.model).__name__}, {state})"

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the model back as it was: same objects, same outputs bit for bit. A second call does nothing."""
        self._ledger.undo()

    def set_hints(self, **hints: list[Any]) -> None:
        """Tell the method what it cannot see, one value per image in batch order; holds until set again.

        Args:
            hints: for example `boxes=[...]` for the oracle of the pocket suite.

        Raises:
            ValueError: the method uses no such hint.
        """
        for name in hints:
            if name not in self.method.hints:
                known = ", ".join(self.method.hints) or "none"
                raise ValueError(f"Method {self.method.name!r} uses no hint {name!r}; it uses: {known}.")
        self._engine.hints.update(hints)

    @property
    def kept(self) -> list[list[Tensor]]:
        """Kept visual tokens of the last batch of prompts: for each sample, for each of its images, the indices in
        that image's own raster order, sorted, `[k]` int64 on the CPU.

        Raises:
            RuntimeError: no prompt has run yet.
        """
        prompt = self._engine.last
        if prompt is None:
            raise RuntimeError("No prompt has run since the method was applied; call model.generate(...) first.")
        kept: list[list[Tensor]] = [[] for _ in range(prompt.layout.batch_size)]
        for span, indices in zip(prompt.layout.spans, prompt.kept):
            kept[span.sample].append(torch.arange(span.num_tokens) if indices is None else indices.cpu())
        return kept

    def report(self) -> Report:
        """Tokens, FLOPs, KV bytes and selection time of the last batch of prompts.

        Raises:
            RuntimeError: no prompt has run yet.
        """
        prompt = self._engine.last
        if prompt is None:
            raise RuntimeError("No prompt has run since the method was applied; call model.generate(...) first.")
        return make_report(prompt, self.method, self.adapter, self.model)
