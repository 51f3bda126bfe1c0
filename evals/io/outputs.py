"""Whether what a command is to write can be written, found out before any work."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_folder(folder: str | Path, option: str = "--output") -> Path:
    """The folder, once it is sure that files can be made in it; it is not made yet.

    Args:
        option: what named it, for the sentence.

    Raises:
        ValueError: a file stands there, or nothing can be written there.
    """
    path = Path(folder)
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        what = "is a file" if there == path else f"lies below the file {there}"
        raise ValueError(f"{path} {what}, and results need a folder; name another one with {option}.")
    try:
        # asking beats reading permission bits: a disk that is mounted read-only refuses root too
        with tempfile.TemporaryFile(dir=there, prefix=".tokenprune-"):
            pass
    except OSError as error:
        raise ValueError(
            f"Nothing can be written into {there} ({error.strerror or error}); name another folder with {option}."
        ) from None
    return path


def check_file(file: str | Path, option: str = "--output") -> Path:
    """The file, once it is sure that it can be made or replaced.

    Raises:
        ValueError: a folder stands there, or nothing can be written beside it.
    """
    path = Path(file)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and {option} names a file.")
    check_folder(path.parent, option)
    return path
