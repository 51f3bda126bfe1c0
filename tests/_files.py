"""Files without which a method cannot be made, from tests: importing this gives such methods a default for them.

Outside of tests they have none, because what was trained for one model is no default for another.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from tokenprune.methods.gtc import CONFIG, WEIGHTS, Gtc, new_student
from tokenprune.methods.sd_rpn import SdRpn


@functools.cache
def student(seed: int = 0) -> str:
    """The folder of a student of gtc with random weights, which fits every model; it goes away with the process."""
    folder = tempfile.TemporaryDirectory(prefix="student-")
    _HELD.append(folder)
    save_file(new_student(seed), Path(folder.name) / WEIGHTS)
    (Path(folder.name) / CONFIG).write_text("{}", encoding="utf-8")
    return folder.name


_HELD: list[tempfile.TemporaryDirectory[str]] = []


def give_files() -> None:
    """Let `Gtc()` be made without a student, and `SdRpn()` without a branch: it takes the model's own layers."""
    SdRpn.__init__.__defaults__ = (None, None, "own", None)  # type: ignore[attr-defined]
    given = Gtc.__init__.__defaults__ or ()
    Gtc.__init__.__defaults__ = (*given[:-1], student())  # type: ignore[attr-defined]


give_files()
