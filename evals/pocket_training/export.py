"""From a checkpoint to the folder that ships:

``python -m tokenprune.evals.pocket_training.export --run DIR --stage C``."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tokenprune.evals.pocket_training.model import MODEL_DIR, build_llava, build_tokenizer, export
from tokenprune.evals.pocket_training.vision import build_tower


def command(build: Callable[[], Any], write: Callable[[Any, Path], None], stage: str, folder: Path, doc: Any) -> None:
    """Write weights (fp16), tokenizer, processor and the training log; the model card stays as it is.

    Args:
        build: a model of the checkpoint's shape.
        write: (model, folder) -> its files.
        stage, folder: defaults of the command line.
        doc: its description.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--run", type=Path, required=True, help="the --out folder of the training")
    parser.add_argument("--stage", default=stage, help="whose checkpoint")
    parser.add_argument("--out", type=Path, default=folder)
    args = parser.parse_args()
    state = torch.load(args.run / f"stage_{args.stage}.pt", weights_only=True)
    model = build()
    model.load_state_dict(state["model"])
    args.out.mkdir(parents=True, exist_ok=True)
    write(model, args.out)
    (args.out / "model.safetensors").chmod(0o644)
    shutil.copy(args.run / "log.csv", args.out / "training_log.csv")
    print(f"{args.out}: stage {state['stage']}, step {state['step']}")


if __name__ == "__main__":
    command(lambda: build_llava(build_tower(), build_tokenizer()), export, "C", MODEL_DIR, __doc__)
