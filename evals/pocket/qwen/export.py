"""From a checkpoint to the folder that ships: ``python -m tokenprune.evals.pocket.qwen.export --run DIR``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from tokenprune.evals.pocket.qwen.model import MODEL_DIR, build_qwen, export


def main() -> None:
    """Write weights (fp16), tokenizer, processor and the training log; the model card stays as it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the --out folder of the training")
    parser.add_argument("--stage", default="J2", help="whose checkpoint")
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    args = parser.parse_args()
    state = torch.load(args.run / f"stage_{args.stage}.pt", weights_only=True)
    model = build_qwen()
    model.load_state_dict(state["model"])
    args.out.mkdir(parents=True, exist_ok=True)
    export(model, args.out)
    (args.out / "model.safetensors").chmod(0o644)
    shutil.copy(args.run / "log.csv", args.out / "training_log.csv")
    print(f"{args.out}: stage {state['stage']}, step {state['step']}")


if __name__ == "__main__":
    main()
