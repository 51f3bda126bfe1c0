"""Which packages that a model's numbers hang on differ here from constraints.txt: `python .ci/newer.py` prints them."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

WATCHED = ("torch", "transformers", "tokenizers", "accelerate", "numpy", "safetensors", "huggingface-hub")
WATCHED += ("peft", "trl")


def main() -> None:
    lines = Path(__file__).resolve().parents[1].joinpath("constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    holds = {one.name.lower(): one.specifier for one in pinned if one.marker is None or one.marker.evaluate()}
    for name in WATCHED:
        here = metadata.version(name)
        if not holds[name].contains(here, prereleases=True):
            print(f"{name}=={here}")


if __name__ == "__main__":
    main()
