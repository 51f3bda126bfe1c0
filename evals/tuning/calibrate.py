"""Finds from a few samples what a method wants to know of a model, and writes it to a file that the method reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenprune import __version__
from tokenprune.evals.errors import as_user_error
from tokenprune.evals.io.atomic_files import replace_file
from tokenprune.evals.io.outputs import check_file
from tokenprune.evals.models.load import LoadedModel, check_device, check_dtype, load_model, model_source
from tokenprune.evals.tasks.unlabelled import check_data, draw_samples
from tokenprune.evals.tuning import contributions, deletions, first_key
from tokenprune.registry import near

CALIBRATED = {"fitprune": deletions, "shortv": contributions, "zerotuning": first_key}


@dataclass
class CalibrateConfig:
    """What to calibrate, and on what.

    Attributes:
        data: as in `tokenprune tune`: of a pocket suite scenes of its validation split, the YAML file of a task, or a
            folder of pictures with a `questions.jsonl`.
        ratio: of fitprune: shares of the visual tokens' FLOPs that shall go, in (0, 1), a schedule for each.
        output: the JSON file.
        labels: of zerotuning: whether answers of the samples are used.
        samples: how many samples.
        seed: of the samples drawn.
    """

    method: str
    model: str
    data: str
    ratio: Sequence[float]
    output: str
    samples: int = 64
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None
    labels: bool = False

    def check(self) -> None:
        """Refuse what would fail later; loads no model and no data.

        Raises:
            UnknownName, ValueError, FileNotFoundError: with a sentence on what to write instead.
        """
        if self.method not in CALIBRATED:
            known = near(self.method, list(CALIBRATED)) + f" Known: {', '.join(CALIBRATED)}."
            raise ValueError(f"There is nothing to calibrate for {self.method!r}.{known}")
        if self.labels and self.method != "zerotuning":
            raise ValueError(f"--labels is of zerotuning; {self.method} needs none.")
        for one in self.ratio:
            if not 0 < one < 1:
                raise ValueError(f"--ratio is the share of FLOPs that shall go, in (0, 1), got {one!r}.")
        if self.samples < 1:
            raise ValueError(f"--samples must be at least 1, got {self.samples}.")
        if Path(self.output).expanduser().suffix != ".json":
            raise ValueError(f"--output is a JSON file like fitprune.json, got {self.output!r}.")
        check_file(Path(self.output).expanduser())
        check_dtype(self.dtype)
        check_device(self.device)
        model_source(self.model)
        check_data(self.data)


def calibrate(config: CalibrateConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Read the samples, find what the method wants to know and write the file; returns what it holds."""
    loaded: LoadedModel = load_model(config.model, config.dtype, config.device)
    with as_user_error():
        samples, _ = draw_samples(config.data, config.samples, 1, config.seed)
        inputs = [loaded.inputs([one.question], [one.image]) for one in samples]
        if config.method == "fitprune":
            found = deletions.schedules(loaded, inputs, config.ratio, say)
        elif config.method == "shortv":
            found = contributions.contributions(loaded, inputs, say)
        else:
            answers = [one.answer for one in samples] if config.labels else None
            found = first_key.first_key(loaded, inputs, answers, say)
    said = {
        "method": config.method,
        "model": config.model,
        "weights": loaded.fingerprint,
        "data": config.data,
        "samples": config.samples,
        "seed": config.seed,
        **found,
        "versions": {"tokenprune": __version__, "torch": torch.__version__},
    }
    path = Path(config.output).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(said, indent=1) + "\n")
    return said


def lines(said: dict[str, Any]) -> list[str]:
    """What was found, for a terminal."""
    return CALIBRATED[said["method"]].lines(said)
