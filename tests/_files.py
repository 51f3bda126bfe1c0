"""Files without which a method cannot be made, from tests: importing this gives such methods a default for them.

Outside of tests they have none, because what was trained for one model is no default for another.
"""

from __future__ import annotations

import functools
import inspect
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tokenprune.methods.fitprune import FitPrune
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


def give_default(method: Any, option: str, value: Any) -> None:
    """Let `method()` be made as if `option` had this default."""
    defaults = inspect.signature(method.__init__).parameters
    known = {name: parameter.default for name, parameter in defaults.items() if name != "self"}
    method.__init__.__defaults__ = tuple({**known, option: value}.values())


def give_files() -> None:
    """Let `Gtc()` be made without a student, `SdRpn()` without a branch: it takes the model's own layers, and
    `FitPrune()` without a schedule."""
    give_default(SdRpn, "branch", "own")
    give_default(FitPrune, "schedule", [6, 9, 4, 2])
    give_default(Gtc, "student", student())


give_files()
