"""What one forward call of a wrapped model brought, and what becomes of it: nothing of a prompt stands on the model.

Each thread has its own, so requests that run at the same time on one model know nothing of each other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from tokenprune.interfaces.signals import Signal
    from tokenprune.interfaces.visual import Visual
    from tokenprune.state.call_inputs import CallInputs
    from tokenprune.state.prompt_state import Prompt
    from tokenprune.state.tower_recording import Recording


@dataclass(eq=False)
class ForwardCall:
    """One forward call, from the outermost wrapped module that was called to its return.

    Attributes:
        module: that module: the model, or the one inside it that merges text and pictures.
        before: the call that was at work when this one began; None for most.
        arguments: what the call was given, by name.
        entered: whether the module that merges text and pictures has begun.
        mask: the attention mask that it was given; what it hands on may be made of that.
        drafted: tokens at the end of each row that are not the prompt's: proposed by a draft, or answered already.
        waiting: what the module that merges was given, where pictures are laid out behind the tower, until they are.
        prompt: the prompts with pictures, laid out; None without pictures.
        masks: masks for the whole rows, where the decoder does not make its own.
        decoder: the pass through the decoder, while it is at work on rows that differ from what it was given.
        layer_inputs: by layer, what entered it, where a stage reads its attention.
        read: by layer, what was read of its attention for the stage behind it.
        laid_out: by kind, pixels of this call and how they are laid out, so that sizes are read once.
        recordings: by kind, runs of the vision tower inside this call.
        transitions: signals of decoder layers that were read on the way, by place in the rows as they stand.
        branch: what entered a layer's attention, and what came out, until its MLP has run.
        attention: what interventions know of this call.
        bypass: the same of layers that visual tokens pass by.
        policy: what a cache policy knows of this call.
        given: what the decoder was given in it.
        served: the pruned KV cache that this call may add keys to.
        labels: copies of the caller's `labels` and `shift_labels` `[B, S]`, as far as there are, for the loss.
        learning: the lock under which interventions learn from prompts, while it holds it.
    """

    module: Any
    before: ForwardCall | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    entered: bool = False
    mask: Any = None
    drafted: int = 0
    waiting: CallInputs | None = None
    prompt: Prompt | None = None
    masks: Any = None  # WholeMasks: a type of a room above this one, as those below
    decoder: Any = None  # DecoderPass, and below LayerInput and DecoderSignals: types of rooms above this one
    layer_inputs: dict[int, Any] = field(default_factory=dict)
    read: dict[int, Any] = field(default_factory=dict)
    laid_out: dict[str, tuple[Tensor, list[Visual]]] = field(default_factory=dict)
    recordings: dict[str, list[Recording]] = field(default_factory=dict)
    transitions: dict[Signal, Tensor] = field(default_factory=dict)
    branch: tuple[Tensor, Tensor] | None = None
    attention: Any = None
    bypass: Any = None
    policy: Any = None
    given: Any = None  # CallInputs
    served: Any = None
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    learning: Any = None

    def clear(self) -> None:
        """Let go of all that is needed only while the module that merges text and pictures is at work."""
        self.prompt, self.masks, self.decoder, self.branch, self.attention = None, None, None, None, None
        self.waiting, self.bypass, self.policy, self.given = None, None, None, None
        self.layer_inputs, self.read, self.laid_out, self.recordings, self.transitions = {}, {}, {}, {}, {}
        self.let_go()

    def let_go(self) -> None:
        """Let others have what it holds: the lock, and the cache that may take its keys."""
        if self.learning is not None:
            self.learning.release()
            self.learning = None
        if self.served is not None:
            self.served.tokenprune_active = self.served.tokenprune_whole = False
            self.served = None


@dataclass(eq=False)
class Generation:
    """One call of `generate`; `prompt_length` is how many ids it began with, once that is known; `ids` `[B, S]` are
    those that it was given, None where it was given embeddings."""

    prompt_length: int | None = None
    ids: Tensor | None = None


class Running:
    """The threads that have a forward call at work on one model."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._threads: set[threading.Thread] = set()
        self._waiting = 0  # how many wish that no call were at work: until they had their turn, none begins

    def note(self, runs: bool) -> None:
        """The thread that asks begins a forward call, or has none any more."""
        with self._changed:
            while runs and self._waiting:
                self._changed.wait()
            (self._threads.add if runs else self._threads.discard)(threading.current_thread())
            self._changed.notify_all()

    @contextmanager
    def paused(self, seconds: float) -> Iterator[bool]:
        """Wait until no other thread is in the middle of a forward call, and let none begin one in the block.

        Yields:
            Whether that came to be within so many seconds.
        """
        end = time.monotonic() + seconds
        with self._changed:
            self._waiting += 1
            try:
                while (others := self._others()) and time.monotonic() < end:
                    self._changed.wait(0.1)  # a thread that dies in its call tells nobody
                yield not others
            finally:
                self._waiting -= 1
                self._changed.notify_all()

    def _others(self) -> bool:
        return any(thread.is_alive() and thread is not threading.current_thread() for thread in self._threads)


class Calls(threading.local):
    """The calls at work on one model, of the thread that asks.

    Attributes:
        now: the forward call at work.
        tower: the run of the vision tower at work; `generate` may start one before any forward call.
        drafted: tokens at the end of the next forward call that are not the prompt's.
        generation: the call of `generate` at work.
        hints: what the caller told of the pictures, see `Handle.set_hints`.
        passes: lists that wish to know of each prompt that ran, see `Handle.watch`.
        running: which threads have a call at work; the same object in all of them.
    """

    def __init__(self, running: Running) -> None:
        self.running = running
        self.now: ForwardCall | None = None
        self.tower: Any = None
        self.drafted = 0
        self.generation: Generation | None = None
        self.hints: dict[str, list[Any]] = {}
        self.passes: list[list[Any]] = []

    def begin(self, module: Any) -> ForwardCall:
        """A forward call of `module` begins. No module calls itself, so one of it that seems to be at work was
        interrupted (by Ctrl-C, or the stop button of a notebook): torch runs no hooks after that."""
        earlier = self.now
        while earlier is not None and earlier.module is not module:
            earlier = earlier.before
        if earlier is not None:
            self.drop_to(earlier.before)
        if self.now is None:
            self.running.note(True)
        self.now = ForwardCall(module, before=self.now)
        return self.now

    def drop_to(self, call: ForwardCall | None) -> None:
        """The calls that began after `call` are over, and no hook said so."""
        while self.now is not None and self.now is not call:
            self.now.let_go()
            self._over(self.now)

    def end(self, module: Any) -> None:
        """The call that `module` began is over, perhaps with an exception."""
        if self.now is not None and self.now.module is module:
            self._over(self.now)

    def _over(self, call: ForwardCall) -> None:
        self.now = call.before
        if self.now is None:
            self.running.note(False)
