"""Time spent on a device, read without stopping it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch


class DeviceTimer:
    """Adds up the time of the blocks run under `running()`: all that a method and its signals do, and nothing else.

    On CUDA it uses events, and only `seconds` waits for the device; elsewhere it uses the host clock.

    Attributes:
        listener: called with True and False around each such block, so that other costs can be told apart too.
    """

    listener: ClassVar[Callable[[bool], None] | None] = None

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Time the block, whose work is queued on `device`."""
        listener = type(self).listener
        if listener is None:
            with self._timed(device):
                yield
            return
        listener(True)
        try:
            with self._timed(device):
                yield
        finally:
            listener(False)

    @contextmanager
    def _timed(self, device: torch.device) -> Iterator[None]:
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

    def join(self, other: DeviceTimer) -> None:
        """Count the time of `other` here too."""
        self._seconds += other._seconds
        self._events += other._events

    @property
    def seconds(self) -> float:
        """Total so far, in seconds."""
        for first, last in self._events:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
        self._events.clear()
        return self._seconds
