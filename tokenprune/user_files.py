"""Python files of a user's own that register methods, interventions or families: `--import my_method.py`.

Their names stand in an environment variable, so that every process that a command starts (workers of `accelerate
launch`, of Ray, of a data loader) knows the same names: a registry imports the files the first time it is asked.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

VARIABLE = "TOKENPRUNE_IMPORT"
"""Paths of the files, separated as those of PATH are."""

_imported: dict[Path, str] = {}
_seen: list[str] = [""]  # what the variable held when it was last read


def import_file(path: str | Path) -> Path:
    """Import a file once, for what it registers.

    Raises:
        FileNotFoundError, ValueError: it is not there, no Python file, or fails; the message has its error and line.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {path} to import; --import takes the path of a Python file.")
    if file.suffix != ".py":
        raise ValueError(f"--import takes a Python file that ends in .py, got {path}.")
    if file in _imported:
        return file
    name = f"tokenprune_user_{file.stem}_{sha256(str(file).encode()).hexdigest()[:8]}"
    spec = spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be imported.")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, (Exception, SystemExit)):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else (lines or [None])[-1]
        where = "" if line is None else f" at line {line}"
        raise ValueError(
            f"{path} cannot be imported: {type(error).__name__}{where}: {str(error).rstrip('.')}."
        ) from error
    _imported[file] = name
    return file


def imported_files() -> list[Path]:
    """The files that were imported, in their order."""
    return list(_imported)


def import_named_files() -> None:
    """Import what `VARIABLE` names and was not imported yet.

    Raises:
        FileNotFoundError, ValueError: see `import_file`.
    """
    named = os.environ.get(VARIABLE, "")
    if named == _seen[0]:
        return
    _seen[0] = named  # first: a file may ask a registry while it is imported
    for path in filter(None, named.split(os.pathsep)):
        import_file(path)


@contextmanager
def importing(paths: Sequence[str]) -> Iterator[None]:
    """Import files, and name them to the processes that are started in the block.

    Raises:
        FileNotFoundError, ValueError: see `import_file`.
    """
    before = os.environ.get(VARIABLE)
    files = [str(import_file(path)) for path in paths]
    if files:
        os.environ[VARIABLE] = os.pathsep.join(filter(None, [before, *files]))
    try:
        yield
    finally:
        if files:
            os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})
