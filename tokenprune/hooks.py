"""Changes on somebody else's object: written down, undone in reverse, kept out of compiled graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

_missing = object()


class Ledger:
    """Records changes and takes them back.

    `undo()` runs every entry even if one of them raises, last change first, and raises the first error at the end.
    """

    def __init__(self) -> None:
        self._entries: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, undo: Callable[[], None]) -> None:
        """Write down how to take back a change that was just made."""
        self._entries.append(undo)

    def hook(self, removable: Any) -> None:
        """Write down a `torch.utils.hooks.RemovableHandle`."""
        self.add(removable.remove)

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute of this very object (its class is left alone) and write down what was there."""
        before = vars(target).get(name, _missing)
        setattr(target, name, value)

        def undo() -> None:
            if before is _missing:
                delattr(target, name)
            else:
                setattr(target, name, before)

        self.add(undo)

    def undo(self) -> None:
        """Take everything back."""
        first_error: Exception | None = None
        while self._entries:
            try:
                self._entries.pop()()
            except Exception as error:
                first_error = first_error or error
        if first_error is not None:
            raise first_error


def opaque(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The same callable, kept out of compiled graphs: what it does depends on the prompt, on the host."""
    return torch.compiler.disable(hook, reason="tokenprune's bookkeeping runs on the host")


class Scratch(threading.local):
    """Values that hooks of one module hand each other, of the thread that asks."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def take(self, *names: str) -> tuple[Any, ...]:
        """The values of these names, which are then gone.

        Raises:
            RuntimeError: a hook did not run, so a module was called in a way that is not known here.
        """
        missing = [name for name in names if name not in self.values]
        if missing:
            raise RuntimeError(
                f"The {' and '.join(missing)} of a block of the vision tower did not pass through the modules that "
                "were hooked: they were replaced or compiled since the method was applied. Call the handle's remove() "
                "and apply the method again."
            )
        return tuple(self.values.pop(name) for name in names)
