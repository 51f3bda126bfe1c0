"""What `apply` gives back: reports on the last prompts, and `remove()`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tokenprune.engine.engine import Engine
from tokenprune.hooks import Ledger
from tokenprune.interfaces.intervention import Intervention
from tokenprune.interfaces.pruner import Pruner
from tokenprune.prompt_view import PromptView
from tokenprune.report import Report

_PATIENCE = 60  # seconds; a forward call of a long prompt takes less


class Handle:
    """A method at work on a model.

    Attributes:
        model: the wrapped model, the very object that was passed in.
        stages: the cuts, in the order in which they run; none where attention is changed only.
        interventions: what changes attention, as prepared for this model.
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
        self._thread = threading.get_ident()

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
        """Give the model back as it was: same objects, same outputs bit for bit. A second call does nothing.

        Where another thread is in the middle of a forward call, this waits for its end: half a call would be pruned.
        A `generate` that goes on from there is told with its next token that its cache holds a pruned prompt.

        Raises:
            RuntimeError: that call does not come to its end.
        """
        with self._engine.calls.running.paused(_PATIENCE) as free:
            if not free:
                raise RuntimeError(
                    f"Another thread has been in one forward call of this model for {_PATIENCE} s, and the method "
                    "cannot be removed in the middle of it. Let that thread come to its end, and call remove() again."
                )
            self._ledger.undo()

    def set_hints(self, **hints: list[Any]) -> None:
        """Tell the method what it cannot see, one value per image or video in batch order; valid until set again.

        What a thread sets is used for that thread's calls. Threads that set nothing see what the thread that applied
        the method has set.

        Args:
            hints: for example `boxes=[...]` for the oracle of the pocket suite.

        Raises:
            ValueError: the method uses no such hint.
        """
        used = sorted({name for stage in self.stages for name in stage.pruner.needed_hints})
        for name in hints:
            if name not in used:
                raise ValueError(f"{self.label} uses no hint {name!r}; it uses: {', '.join(used) or 'none'}.")
        self._engine.hints.set(hints, threading.get_ident() == self._thread)

    @property
    def last(self) -> PromptView | None:
        """The last batch of prompts, of any thread; None before the first. It stays what it is when others follow."""
        prompt = self._engine.last
        return None if prompt is None else PromptView(prompt, self._engine, self.label)

    @property
    def kept(self) -> list[list[Tensor]]:
        """Visual tokens of the last batch of prompts that reached the end of the decoder: for each sample, for each of
        its images and videos, the indices in that visual's raster order (crops or frames one after the other),
        sorted, `[k]` int64 on the CPU.

        The last batch is that of any thread; where several run on one model, see `watch`. Within one call of
        `generate`, a pass of text alone (as guidance makes) takes nothing away from the one with pictures.

        Raises:
            RuntimeError: no prompt has run yet.
        """
        return self._last().kept

    @property
    def visual_by_layer(self) -> list[list[int]]:
        """For each sample of the last batch of prompts, its visual tokens in every decoder layer.

        Raises:
            RuntimeError: no prompt has run yet.
        """
        return self._last().visual_by_layer

    @property
    def stays(self) -> Tensor:
        """`[B, S]` bool on the CPU: which places of the last batch of prompts reached the end of the decoder, text and
        padding among them.

        Raises:
            RuntimeError: no prompt has run yet.
        """
        return self._last().stays

    @property
    def stays_by_layer(self) -> dict[int, Tensor]:
        """As `stays`, at each decoder layer before which something left, in their order; layer 0 is there always, with
        what the decoder was given."""
        return self._last().stays_by_layer

    @property
    def kept_at(self) -> dict[str, list[list[Tensor]]]:
        """As `kept`, after each site at which something left, in the order in which they ran."""
        return self._last().kept_at

    @contextmanager
    def watch(self) -> Iterator[list[PromptView]]:
        """Collect every batch of prompts that this thread runs inside the `with` block, in order, a `PromptView` of
        each. Other threads' prompts are not among them."""
        passes: list[Any] = _Views(self._engine, self.label)
        self._engine.calls.passes.append(passes)
        try:
            yield passes
        finally:
            self._engine.calls.passes[:] = [other for other in self._engine.calls.passes if other is not passes]

    def _last(self) -> PromptView:
        last = self.last
        if last is None:
            raise RuntimeError("No prompt has run since the method was applied; call model.generate(...) first.")
        return last

    def report(self) -> Report:
        """Tokens, FLOPs, KV bytes and selection time of the last batch of prompts.

        Raises:
            RuntimeError: no prompt has run yet.
        """
        return self._last().report()


class _Views(list[Any]):
    """Views of the prompts that are appended to it."""

    def __init__(self, engine: Engine, label: str) -> None:
        super().__init__()
        self._engine, self._label = engine, label

    def append(self, prompt: Any) -> None:
        super().append(PromptView(prompt, self._engine, self._label))
