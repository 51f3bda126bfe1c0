"""Time spent on a device, read without stopping it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time of the blocks run under `running()`.

    On CUDA it uses events, and only `seconds` waits for the device; elsewhere it uses the host clock.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Time the block, whose work is queued on `device`."""
        if device.type == "cuda":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            try:
                yield
            finally:
                last.record()
                self._events.append((first, last))
        else:
            begin = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - begin

    @property
    def seconds(self) -> float:
        """Total so far, in seconds."""
        for first, last in self._events:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
        self._events.clear()
        return self._seconds
