"""In a checkout: where `tokenprune.adapters`, `.kernels`, `.evals` and `.configs` are found, and nothing else of what
stands beside them (`tokenprune.tokenprune`, `tokenprune.tests`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType

NAMES = ("adapters", "configs", "evals", "kernels")


class Siblings:
    """Finds four folders of a checkout, as an entry of `tokenprune.__path__`.

    Args:
        folder: of the checkout.
    """

    def __init__(self, folder: Path) -> None:
        self._finder = FileFinder(str(folder), (SourceFileLoader, [".py"]))

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        """As importlib asks."""
        return self._finder.find_spec(fullname, target) if fullname.rpartition(".")[2] in NAMES else None

    def iter_modules(self, prefix: str = "") -> Iterator[tuple[str, bool]]:
        """As pkgutil, and with it `help`, asks."""
        return iter((prefix + name, True) for name in NAMES)

    def invalidate_caches(self) -> None:
        """As importlib asks."""
        self._finder.invalidate_caches()


def place_of(folder: Path) -> str:
    """A path for `tokenprune.__path__`: the checkout's, written so that nobody else asks for it; what is found there is
    up to `Siblings`. Where that is forgotten (a cleared importer cache), it is a folder like any other."""
    place = f"{folder}{os.sep}."
    sys.path_importer_cache[place] = Siblings(folder)  # type: ignore[assignment]
    return place
