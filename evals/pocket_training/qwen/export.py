"""From a checkpoint to the folder that ships: ``python -m tokenprune.evals.pocket_training.qwen.export --run DIR``."""

from __future__ import annotations

from tokenprune.evals.pocket_training.export import command
from tokenprune.evals.pocket_training.qwen.model import MODEL_DIR, build_qwen, export

if __name__ == "__main__":
    command(build_qwen, export, "J5", MODEL_DIR, __doc__)
