"""Undo ledger: everything that is changed on somebody else's object is written down and undone in reverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
