"""What a training run is told; imports nothing heavy, so that a typo fails at once."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenprune.evals.io.atomic_files import replace_file
from tokenprune.evals.io.digest import digest
from tokenprune.evals.io.outputs import check_folder
from tokenprune.evals.models.load import check_device, check_dtype, model_source
from tokenprune.evals.pocket.catalog import SUITES, refuse_test_only
from tokenprune.evals.tasks.load import check_task


@dataclass
class TrainConfig:
    """One training run.

    Attributes:
        method: "gtc" or "sd_rpn".
        data: "pocket", "pocket-mixed" or a family ("pocket:FAMILY"): scenes of the suite's training split, drawn on
            the fly; nothing of its test split is looked at. Or the YAML file of a task of your own training questions.
        output: folder of the weights, their config, labels and checkpoints.
        samples: questions that labels are made of; those that the model answers wrongly are left out.
        held_out: questions on other pictures, on which the result is checked.
        epochs, batch_size, rate: of the optimizer.
        seed: of the questions drawn, the first weights and the order of batches.
    """

    method: str
    model: str
    data: str
    output: str
    samples: int = 360
    held_out: int = 40
    epochs: int = 25
    batch_size: int = 16
    rate: float = 3e-3
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(self.output).expanduser()

    @property
    def fitting(self) -> str:
        """A digest of what the weights depend on beside the labels: a checkpoint of other settings is not gone on
        from."""
        names = ("method", "epochs", "batch_size", "rate", "seed")
        return digest({name: getattr(self, name) for name in names})[:8]

    def check(self) -> None:
        """Refuse what would fail later; loads no model and no data.

        Raises:
            UnknownName, ValueError, FileNotFoundError: with a sentence on what to write instead.
        """
        for name in ("samples", "held_out", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        if not self.rate > 0:
            raise ValueError(f"--rate must be above 0, got {self.rate!r}.")
        check_folder(self.folder)
        check_dtype(self.dtype)
        check_device(self.device)
        model_source(self.model)
        refuse_test_only(self.data, "to train on")
        if self.data.partition(":")[0] not in SUITES or self.data != self.data.partition(":")[0]:
            check_task(self.data)
        self.folder.mkdir(parents=True, exist_ok=True)

    def claim(self, fingerprint: str, **more: Any) -> None:
        """Write down what the labels of the folder are of, or find that they are of the same.

        Args:
            fingerprint: of the model's weights.
            more: further settings that labels depend on.

        Raises:
            ValueError: the folder holds labels of another run.
        """
        free = ("output", "device", "epochs", "batch_size", "rate")
        mine = {name: value for name, value in asdict(self).items() if name not in free}
        mine = json.loads(json.dumps({**mine, "weights": fingerprint, **more}))
        path = self.folder / "settings.json"
        if path.is_file():
            theirs = json.loads(path.read_text(encoding="utf-8"))
            other = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
            if other:
                raise ValueError(
                    f"{self.folder} holds labels of a run with another {', '.join(other)}. Name another --output, "
                    "or remove it."
                )
            return
        replace_file(path, json.dumps(mine, indent=1, sort_keys=True) + "\n")
