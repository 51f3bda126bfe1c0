"""Whether what the library says of wrong input is a sentence of its own: the judge of the fuzz cases."""

from __future__ import annotations

import ast
import functools
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _paths import ROOT

LIBRARY = tuple(str(ROOT / name) for name in ("tokenprune", "adapters", "kernels", "evals"))
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
)
"""What no input may make the library do; Python tells of each as it happens."""


@dataclass(frozen=True)
class Finding:
    """A case that did not end in a result or a sentence.

    Attributes:
        kind, number: which case; `--kind KIND --case NUMBER` runs it alone.
        why: what is wrong.
        where: the last frames.
    """

    kind: str
    number: int
    why: str
    where: str


@functools.cache
def _raises(file: str) -> tuple[tuple[int, int], ...]:
    """First and last lines of the raise statements of a source file."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    return tuple(
        (node.lineno, node.end_lineno or node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Raise)
    )


def complaint(error: BaseException) -> str | None:
    """What is wrong with an error as an answer to wrong input; None: it is a sentence that the library raised."""
    if isinstance(error, (RecursionError, MemoryError, AssertionError)) or not isinstance(error, Exception):
        return f"{type(error).__name__} is no answer"
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    line = last.lineno or 0
    if not last.filename.startswith(LIBRARY) or not any(a <= line <= b for a, b in _raises(last.filename)):
        return f"{type(error).__name__} that the library did not raise"
    text = str(error)
    if len(re.findall(r"\w+", text)) < 4 or not re.search(r"[.?!)\]}'\"]\s*$", text):
        return "no sentence"
    if len(text) > 20_000:
        return f"a sentence of {len(text)} letters"
    return None


_watched: list[str] | None = None
_hooked = False


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watched is not None and event in FORBIDDEN:
        _watched.append(f"{event}{args!r:.200}")


@contextmanager
def watched() -> Iterator[list[str]]:
    """Collect forbidden acts of the block."""
    global _watched, _hooked
    if not _hooked:
        sys.addaudithook(_audit)  # there is no way to take one off
        _hooked = True
    _watched = []
    try:
        yield _watched
    finally:
        _watched = None


def judge(kind: str, number: int, case: Callable[[], Any]) -> Finding | None:
    """Run a case; None where it gave a result or a sentence, and did nothing forbidden."""
    with watched() as acts, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case()
            why, where = None, ""
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            why = complaint(error)
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            where = "".join(traceback.format_list(frames)) + f"{type(error).__name__}: {str(error)[:500]}"
    if acts:
        why = f"it did {acts[0]}"
    return None if why is None else Finding(kind, number, why, where)
