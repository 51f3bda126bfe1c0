"""Which sources decide an answer: a digest of them tells whether a kept answer may be used again.

Whole packages are walked, so that a file is in it from its first day and stays in it wherever it moves. What does not
decide is listed; `test_fingerprint.py` fails where that list leaves out something that asking imports.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenprune
from tokenprune.user_files import imported_files

NO_ANSWER = (
    "cli.py", "commands", "configs", "cost.py", "handle.py", "prompt_view.py", "report.py",
    "kernels/aot.py", "evals/bench", "evals/config", "evals/errors.py", "evals/io/atomic_files.py",
    "evals/io/digest.py", "evals/io/folder_lock.py", "evals/io/outputs.py", "evals/io/progress.py",
    "evals/io/row_store.py", "evals/io/rows.py",
    "evals/learned", "evals/lmms", "evals/pocket_training",
    "evals/profiling", "evals/report", "evals/results", "evals/single_image.py", "evals/statistics", "evals/sweep",
    "evals/tuning",
)  # fmt: skip
"""Files and folders of the package that no answer depends on: what it costs, how it is kept, counted and shown. What a
point is (`evals/config`) stands in the keys of its rows."""


COUNTING = ("cost.py", "handle.py", "report.py", "evals/profiling")
"""Those of them that costs depend on."""


def deciding_files() -> Iterator[tuple[str, Path]]:
    """Sources that decide an answer, as (path within the package, file), sorted by the former."""
    return ((name, file) for name, file in _sources() if not _is_in(name, NO_ANSWER))


def _sources() -> Iterator[tuple[str, Path]]:
    files: dict[str, Path] = {}
    for place, folder in enumerate(map(Path, tokenprune.__path__)):
        # in a checkout the second folder is the repository, of which these four belong to the package
        parts = ("adapters", "kernels", "evals", "configs") if place else (".",)
        for part in parts:
            for file in (folder / part).rglob("*"):
                name = file.relative_to(folder).as_posix()
                if file.suffix in (".py", ".yaml"):
                    files.setdefault(name, file)
    yield from sorted(files.items())


def code_fingerprint() -> str:
    """A digest of the sources that decide an answer, so that a resumed run never mixes the rows of two versions."""
    own = ((file.name, file) for file in imported_files())  # a method of the user's own that was changed answers anew
    return _hashed(itertools.chain(deciding_files(), own))


def costs_fingerprint() -> str:
    """A digest of the sources that count and time, which decide no answer: a run that goes on after they changed must
    not put two ways of counting into one table."""
    return _hashed((name, file) for name, file in _sources() if _is_in(name, COUNTING))


def _hashed(files: Iterable[tuple[str, Path]]) -> str:
    hasher = hashlib.sha256()
    for name, file in files:
        hasher.update(name.encode() + b"\0" + file.read_bytes())
    return hasher.hexdigest()[:16]


def _is_in(name: str, listed: tuple[str, ...]) -> bool:
    return any(name == one or name.startswith(one + "/") for one in listed)
