"""``python -m tokenprune.evals.pocket_training.qwen.train --out DIR [--resume]``: the recipe, three hours on one core.

pocket-llava is the teacher and lends its decoder. ``DIR/stage_NAME.pt`` is written every few minutes and ``--resume``
goes on from it; ``DIR/log.csv`` grows by a line every few steps.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from tokenprune.evals.pocket_training import train as llava
from tokenprune.evals.pocket_training.qwen import answer, see
from tokenprune.evals.pocket_training.qwen.model import build_qwen
from tokenprune.evals.pocket_training.qwen.transfer import load_teacher, transfer
from tokenprune.evals.pocket_training.train import learning_rate, make_optimizer, save  # noqa: F401  (tools of the stages)

_MIX = {"relation": 5, "exist": 4, "count": 6, "attribute": 3, "read": 1, "global": 1}
_SMALL = ((12, 12), (12, 12), (12, 12), (10, 14), (14, 10), (16, 10), (9, 12))
_CLIPS = ((8, 8), (10, 8), (8, 10), (12, 12))
_MORE = (*_SMALL, (14, 14), (16, 12), (12, 16), (16, 16), (20, 14), (14, 20))


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe.

    ``seed``: offset of its scenes within the split's range; ``clips``: share of batches that are videos; ``easy``:
    easy-VQA pictures a batch in stage V, their share in the others; ``objects``: things a scene, from - to; ``sizes``,
    ``clip_sizes``: columns and rows of tokens; ``grids``: pairs of frames a clip; ``tokens``: visual tokens a batch;
    ``drop``, ``drop_end``: share of batches in which background tokens are dropped before the decoder, at the first and
    the last step; ``thin``: most things with it, and the questions about them; ``mix``: questions a picture;
    ``weight``: of an answer, where few of its family are asked; ``fit``: weight of the teacher's tokens, in stages J of
    its hidden states; ``see``: weight of the heads of stage V; ``sign``: of the head on the sign's symbols among them;
    ``tower_lr``: rate of the tower as a part of ``lr``; ``every``: steps from one line of the log to the next;
    ``after``: the stage whose weights it starts from.
    """

    name: str
    steps: int
    lr: float
    seed: int
    objects: tuple[int, int] = (5, 9)
    clips: float = 0.2
    easy: float = 1
    sizes: tuple[tuple[int, int], ...] = _SMALL
    clip_sizes: tuple[tuple[int, int], ...] = ((8, 8), (10, 8), (8, 10))
    grids: tuple[int, ...] = (2,)
    tokens: int = 1152
    drop: float = 0.0
    drop_end: float = 0.0
    thin: bool = False
    mix: dict[str, int] = field(default_factory=lambda: dict(_MIX))
    weight: dict[str, float] = field(default_factory=lambda: {"read": 3.0, "global": 3.0, "video": 2.0})
    fit: float = 0.0
    see: float = 0.0
    sign: float = 1.0
    tower_lr: float = 0.5
    every: int = 25
    after: str = ""


# small pictures, most of which is the sign: seven times as many symbols a step
_SIGNS = ((6, 4), (5, 4), (6, 5), (12, 12))
_MORE_SIGNS = ((6, 4), (5, 4), (6, 5), (6, 4), (5, 4), (12, 12))


def _signs(name: str, after: str, steps: int, lr: float, seed: int, **more: Any) -> Stage:
    """A stage V that is mostly about symbols."""
    given = {"objects": (1, 3), "sizes": _SIGNS, "clips": 0.15, "fit": 3.0, "sign": 3.0, **more}
    return Stage(name, steps=steps, lr=lr, seed=seed, after=after, **given)


def _answers(name: str, after: str, steps: int, seed: int, **more: Any) -> Stage:
    """A stage J on pictures and clips of all sizes."""
    given = {
        "easy": 0.15, "sizes": _MORE, "clip_sizes": ((8, 8), (10, 8), (10, 10)), "grids": (2, 2, 4), "thin": True,
        "fit": 0.25, "see": 0.1, **more,
    }  # fmt: skip
    return Stage(name, steps=steps, lr=3e-4, seed=seed, after=after, **given)


_READ = {"read": 4.0, "count": 1.5, "global": 2.0, "video": 2.0}
_READ_MORE = {**_READ, "read": 5.0}
STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "V", steps=600, lr=2e-3, seed=300_000_000, objects=(6, 11), clips=0.4, clip_sizes=_SMALL, fit=5.0,
        ),
        Stage(
            "VM", steps=140, lr=1.5e-3, seed=310_000_000, objects=(4, 9), clips=0.7, fit=1.0,
            sizes=_CLIPS, clip_sizes=_CLIPS, after="V",
        ),
        Stage(
            "J", steps=450, lr=5e-4, seed=320_000_000, objects=(3, 8), easy=0.1, drop=0.5, drop_end=0.4, fit=0.5,
            see=0.1, clips=0.25, after="VM",
        ),
        _signs("VS", "J", 260, 1.5e-3, 330_000_000),
        _answers(
            "J2", "VS", 250, 340_000_000, easy=0.1, thin=False, drop=0.4, drop_end=0.4,
            weight={"read": 4.0, "global": 2.0, "video": 2.0},
        ),
        _signs("VS2", "J2", 180, 1.2e-3, 350_000_000),
        _answers("J3", "VS2", 200, 360_000_000, drop=0.6, drop_end=0.6, weight=_READ),
        _signs("VS3", "J3", 500, 1.5e-3, 370_000_000, sizes=_MORE_SIGNS, clips=0.12, sign=5.0),
        _answers("J4", "VS3", 320, 380_000_000, clips=0.15, drop=0.5, drop_end=0.5, weight=_READ_MORE),
        _signs("VS4", "J4", 300, 1.2e-3, 390_000_000, sizes=_MORE_SIGNS, clips=0.12, sign=5.0),
        _answers("J5", "VS4", 360, 400_000_000, clips=0.15, drop=0.5, drop_end=0.5, weight=_READ_MORE),
    )
}  # fmt: skip


class Log(llava.Log):
    """The columns of this recipe."""

    columns = (
        "stage", "step", "images", "seconds", "loss", "fit", "shape", "colour", "sign", "way", "pattern", "see",
        "exist", "attribute", "count", "relation", "read", "global", "easy_vqa", "video",
    )  # fmt: skip


def load(out: Path, stage: Stage, resume: bool) -> dict[str, Any] | None:
    """The checkpoint that ``stage`` goes on from: its own, or that of the stage before; None for a fresh start."""
    own = out / f"stage_{stage.name}.pt"
    if resume and own.exists():
        return torch.load(own, weights_only=True)
    return torch.load(out / f"stage_{stage.after}.pt", weights_only=True) if stage.after else None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the log")
    parser.add_argument("--stages", default=",".join(STAGES), help="which stages, in order")
    parser.add_argument("--start", type=Path, help="exported weights that the first of the stages starts from")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    teacher, model = load_teacher(), build_qwen()
    transfer(model, teacher)
    for i, name in enumerate(args.stages.split(",")):
        stage, module = STAGES[name], see if name.startswith("V") else answer
        if args.start and i == 0:
            stage = replace(stage, after="START")
            exported = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.start, dtype="float32")
            state = {"stage": "START", "step": 0, "model": exported.state_dict()}
            torch.save(state, args.out / "stage_START.pt")
        module.train(stage, args.out, args.resume, sys.modules[__name__], model, teacher)


if __name__ == "__main__":
    main()
