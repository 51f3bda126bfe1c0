"""The one thread that owns the model, and the queue before it.

Requests are answered one after the other, each alone: a prompt's logits then do not depend on who else asks, a method
is at work for its own request only, and a cut that differs by request needs no ragged batch. A batch would be faster
where a GPU is not filled by one prompt; that is what vLLM is for.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from tokenprune.server.refusals import Refused

log = logging.getLogger("tokenprune.server")


class Slot:
    """Room for one request, from before its body is read until its answer is made or given up."""

    def __init__(self, free: Callable[[], None]) -> None:
        self._free: Callable[[], None] | None = free

    def release(self) -> None:
        """Give the room back; a second call does nothing."""
        free, self._free = self._free, None
        if free is not None:
            free()


class Job:
    """A request on its way through the worker.

    Attributes:
        request: what to answer.
        emit: takes events, from the worker's thread; must not wait.
        slot: given back by the worker.
        cancelled: set when nobody waits for the answer any more; the answer stops at the next token.
    """

    def __init__(self, request: Any, emit: Callable[[Any], None], slot: Slot) -> None:
        self.request, self.emit, self.slot = request, emit, slot
        self.cancelled = threading.Event()


class Worker:
    """Answers jobs one at a time.

    Args:
        answer: emits the events of a job and returns the last one, None where nobody waits for it; raises `Refused`
            with a sentence for the client.
        queue: jobs that may wait while one is answered.
    """

    def __init__(self, answer: Callable[[Job], Any], queue: int) -> None:
        self._answer, self._room = answer, queue + 1
        self._taken = 0
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._running: Job | None = None
        self._closing = False
        self._seconds = 1.0  # that an answer takes, averaged over the last ones
        self._thread = threading.Thread(target=self._work, name="tokenprune-model", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def reserve(self) -> Slot:
        """Room for one more request.

        Raises:
            Refused: the queue is full (503, with the seconds until a place may be free), or the server stops.
        """
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise Refused("This server is stopping and takes no more requests.", 503, code="stopping")
            if self._taken >= self._room:
                wait = math.ceil(self._seconds)
                raise Refused(
                    f"This server is busy: {self._taken} requests are waiting or being answered, as many as it takes. "
                    f"Send this one again in {wait} s.",
                    503, code="queue_full", retry_after=wait,
                )  # fmt: skip
            self._taken += 1
        return Slot(self._free)

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more: leave the queue, or stop at the next token."""
        job.cancelled.set()
        with self._changed:
            if job not in self._waiting:
                return  # its answer is being made, or done: the worker gives its room back
            self._waiting.remove(job)
        job.slot.release()

    def state(self) -> dict[str, Any]:
        """For `/health`."""
        with self._changed:
            alive = self._thread.is_alive() and not self._closing
            return {
                "status": "ok" if alive else "stopping", "answering": int(self._running is not None),
                "waiting": len(self._waiting), "taken": self._taken, "room": self._room,
            }  # fmt: skip

    def close(self, seconds: float) -> None:
        """Refuse what waits, stop the answer that is being made at its next token, and wait so long for that."""
        with self._changed:
            self._closing = True
            left, running = list(self._waiting), self._running
            self._waiting.clear()
            self._changed.notify_all()
        for job in left:
            job.emit(Refused("This server is stopping.", 503, code="stopping"))
            job.slot.release()
        if running is not None:
            running.cancelled.set()
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _free(self) -> None:
        with self._changed:
            self._taken -= 1

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                job = self._running = self._waiting.popleft()
            started = time.monotonic()
            try:
                last = self._answer(job)
            except Refused as refused:
                last = refused
            except BaseException as error:  # whatever it is, this thread answers the next one
                log.exception("A request failed")
                says = f"The server failed on this request ({type(error).__name__}); its log says more."
                last = Refused(says, 500, code="failed")
            with self._changed:
                self._running = None
                self._seconds += 0.2 * (time.monotonic() - started - self._seconds)
            job.slot.release()  # before the client hears: it may ask again at once
            if last is not None:
                job.emit(last)
