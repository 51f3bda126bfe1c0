"""The recipe: ``python -m tokenprune.evals.pocket_training.train --out DIR [--resume]``, hours on two CPU cores.

Stages, each with its own learning-rate cycle. ``DIR/stage_NAME.pt`` is written every few minutes and ``--resume`` goes
on from it; ``DIR/log.csv`` grows by a line every few steps. A window is 12 x 12 patches (168 pixels) that keep the
position ids of a random place in the full 24 x 24 grid, so neighbours stay neighbours when whole images come.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tokenprune.evals.pocket.easy_vqa import easy_split
from tokenprune.evals.pocket.scenes import PATCH, SPLIT_SEED, make_scene
from tokenprune.evals.pocket_training.vision import (
    GRID,
    Heads,
    build_tower,
    easy_losses,
    patch_targets,
    run_tower,
    to_pixels,
    vision_losses,
    window_positions,
)  # fmt: skip

_MIX = {"relation": 7, "exist": 6, "count": 5, "attribute": 4, "read": 1, "global": 1}


_HARD = {"relation": 10, "exist": 3, "count": 6, "attribute": 2, "read": 1, "global": 1}


_COUNT = {"relation": 6, "exist": 3, "count": 9, "attribute": 2, "read": 1, "global": 1}


_READ = {"relation": 1, "exist": 1, "count": 4, "attribute": 1, "read": 1, "global": 1}


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe.

    ``size``: pixels a side of the training images; ``seed``: offset of its scenes within the split's range;
    ``objects``: things a scene, from - to; ``easy``: share of easy-VQA images; ``drop``, ``drop_end``: share of batches
    in which background tokens are dropped before the decoder, at the first and the last step; ``mix``: questions an
    image; ``vision`` and ``ground``: weights of the auxiliary losses; ``tower_lr``, ``head_lr``: the rates of tower and
    projector, and of the output layer, as parts of ``lr``; ``after``: the stage whose weights it starts from;
    ``shape``: weight of the shape loss within the vision losses; ``every``: steps from one line of the log to the next;
    ``heads_only``: the model is frozen and only the throw-away heads learn.
    """

    name: str
    steps: int
    batch: int
    lr: float
    size: int
    seed: int
    objects: tuple[int, int]
    easy: float = 1 / 16
    drop: float = 0.0
    drop_end: float = 0.0
    mix: dict[str, int] = field(default_factory=lambda: dict(_MIX))
    vision: float = 0.0
    ground: float = 0.0
    tower_lr: float = 0.3
    head_lr: float = 1.0
    after: str = ""
    shape: float = 1.0
    every: int = 25
    heads_only: bool = False


STAGES = {
    "A": Stage("A", steps=1000, batch=32, lr=1.5e-3, size=168, seed=0, objects=(5, 9)),
    "A2": Stage("A2", steps=550, batch=32, lr=8e-4, size=168, seed=50_000_000, objects=(7, 11), after="A", shape=3.0),
    "A3": Stage("A3", steps=120, batch=32, lr=5e-4, size=168, seed=80_000_000, objects=(5, 9), after="A2", shape=3.0),
    "P": Stage("P", steps=125, batch=24, lr=3e-3, size=168, seed=90_000_000, objects=(5, 9), after="A3"),
    "B": Stage(
        "B", steps=400, batch=8, lr=5e-4, size=168, seed=100_000_000, objects=(3, 7), easy=0.08, drop=0.6, drop_end=0.4,
        vision=0.1, ground=0.3, tower_lr=0.4, head_lr=3.0, after="P", shape=2.0,
    ),
    "B2": Stage(
        "B2", steps=350, batch=8, lr=6e-4, size=168, seed=150_000_000, objects=(3, 7), easy=0.08, drop=0.5,
        drop_end=0.4, vision=0.1, ground=0.3, tower_lr=0.4, head_lr=2.0, after="B", shape=2.0, mix=_HARD,
    ),
    "B3": Stage(
        "B3", steps=200, batch=8, lr=5e-4, size=168, seed=170_000_000, objects=(3, 7), easy=0.08, drop=0.5,
        drop_end=0.4, vision=0.1, ground=0.4, tower_lr=0.3, head_lr=1.0, after="B2", shape=2.0, mix=_HARD,
    ),
    "S": Stage("S", steps=100, batch=24, lr=2e-3, size=168, seed=190_000_000, objects=(3, 7), after="B3"),
    "R": Stage(
        "R", steps=200, batch=24, lr=7e-4, size=168, seed=180_000_000, objects=(2, 4), easy=0.04, drop=1.0,
        drop_end=1.0, ground=0.4, tower_lr=0.0, after="S", mix={"read": 1, "count": 2, "relation": 1, "exist": 1},
    ),
    "R2": Stage(
        "R2", steps=150, batch=24, lr=8e-4, size=168, seed=185_000_000, objects=(2, 4), easy=0.04, drop=0.8,
        drop_end=0.8, ground=0.2, tower_lr=0.0, after="R", mix={"read": 1, "count": 2, "relation": 1, "exist": 1},
    ),
    "C": Stage(
        "C", steps=200, batch=6, lr=5e-4, size=336, seed=200_000_000, objects=(5, 9), easy=0.1, drop=0.6, drop_end=0.2,
        vision=0.1, ground=0.2, tower_lr=0.3, after="R2", shape=2.0, every=20, mix=_COUNT,
    ),
    # exported weights have no heads: a run that starts from them teaches new ones before they may pull at the tower
    "H": Stage(
        "H", steps=150, batch=16, lr=2e-3, size=168, seed=186_000_000, objects=(4, 8), easy=0.08, vision=1.0,
        ground=1.0, tower_lr=1.0, after="C", shape=2.0, heads_only=True,
    ),
    "R3": Stage(
        "R3", steps=200, batch=16, lr=6e-4, size=168, seed=187_000_000, objects=(4, 8), easy=0.08, drop=0.6,
        drop_end=0.4, vision=0.1, ground=0.2, tower_lr=0.3, after="H", shape=2.0, mix=_READ,
    ),
    "C2": Stage(
        "C2", steps=400, batch=6, lr=4e-4, size=336, seed=210_000_000, objects=(5, 9), easy=0.1, drop=0.4, drop_end=0.1,
        vision=0.1, ground=0.1, tower_lr=0.3, after="R3", shape=2.0, mix=_COUNT,
    ),
    # short prompts again, which C2 saw too few of: with the right 64 tokens it read 4 points less than with all
    "C3": Stage(
        "C3", steps=180, batch=6, lr=2.5e-4, size=336, seed=220_000_000, objects=(5, 9), easy=0.1, drop=0.7,
        drop_end=0.5, vision=0.1, ground=0.1, tower_lr=0.3, after="C2", shape=2.0, mix=_READ,
    ),
}  # fmt: skip


def vision_batch(stage: Stage, step: int, easy: int = 2) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor, Tensor]:
    """Pixels [B, 3, S, S], position ids, targets of the first images, shape and colour of the last ``easy`` ones."""
    rng = random.Random(1_000_003 * step + stage.seed)
    start = SPLIT_SEED["train"] + stage.seed + step * stage.batch
    scenes = [make_scene(start + i, stage.size, stage.objects, 0.9) for i in range(stage.batch - easy)]
    targets = [patch_targets(scene) for scene in scenes]
    extra = easy_split("train")
    picks = [rng.randrange(len(extra.images)) for _ in range(easy)]
    images = np.stack([s.image for s in scenes] + [extra.image(i, stage.size) for i in picks])
    side = stage.size // PATCH
    corners = torch.tensor([[rng.randint(0, GRID - side), rng.randint(0, GRID - side)] for _ in images])
    target = {key: torch.from_numpy(np.stack([t[key] for t in targets])) for key in targets[0]}
    shape, colour = torch.from_numpy(extra.shape[picks]), torch.from_numpy(extra.colour[picks])
    return to_pixels(images), window_positions(corners, side), target, shape, colour


def learning_rate(step: int, steps: int, peak: float, warmup: int = 60) -> float:
    """Linear warm-up, then a cosine down to a twentieth of ``peak``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def make_optimizer(modules: dict[nn.Module, float]) -> torch.optim.AdamW:
    """AdamW over ``modules``, each with its factor on the learning rate (the group's "scale").

    A parameter belongs to the first module that holds it. No weight decay on vectors.
    """
    taken: set[int] = set()
    groups = []
    for module, scale in modules.items():
        mine = [p for p in module.parameters() if p.requires_grad and id(p) not in taken]
        taken |= {id(p) for p in mine}
        for matrix in (True, False):
            found = [p for p in mine if (p.ndim > 1) == matrix]
            if found:
                groups.append({"params": found, "weight_decay": 0.02 if matrix else 0.0, "scale": scale})
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)


class Log:
    """A CSV file that grows; columns that a stage does not measure stay empty."""

    columns = (
        "stage", "step", "images", "seconds", "loss", "shape", "colour", "sign", "pattern", "place", "mask",
        "penultimate_f1", "penultimate_text", "penultimate_pattern", "last_f1", "last_text", "last_pattern", "ground",
        "exist", "attribute", "count", "relation", "read", "global", "easy_vqa",
    )  # fmt: skip

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            self._write(list(self.columns))

    def add(self, **values: object) -> None:
        """Append a line and print it."""
        short = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in values.items()}
        self._write([short.get(column, "") for column in self.columns])
        print(" ".join(f"{k}={v}" for k, v in short.items()), flush=True)

    def _write(self, row: list[str]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(row)


def save(path: Path, stage: str, step: int, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint so that a crash while writing leaves the previous one whole."""
    state = {"stage": stage, "step": step, "optimizer": optimizer.state_dict()}
    state |= {name: module.state_dict() for name, module in modules.items()}
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train_vision(stage: Stage, out: Path, resume: bool) -> None:
    """Stage A: the tower alone."""
    tower = build_tower()
    heads = Heads(tower.config.hidden_size)
    optimizer = make_optimizer({tower: 1.0, heads: 1.0})
    modules: dict[str, nn.Module] = {"tower": tower, "heads": heads}
    path, log, first = out / f"stage_{stage.name}.pt", Log(out / "log.csv"), 0
    begun = resume and path.exists()
    if begun or stage.after:
        state = torch.load(path if begun else out / f"stage_{stage.after}.pt", weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(state[name])
        if begun:
            first = state["step"]
            optimizer.load_state_dict(state["optimizer"])
    began, total, seen = time.time(), 0.0, {}
    for step in range(first, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage.steps, stage.lr)
        pixels, positions, target, shape, colour = vision_batch(stage, step)
        n = len(target["n"])
        states = run_tower(tower, pixels, positions)
        loss, log_values = vision_losses(heads, [s[:n] for s in states], positions[:n], target, stage.shape)
        loss = loss + 0.15 * easy_losses(heads, [s[n:] for s in states], shape, colour)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for m in modules.values() for p in m.parameters()], 2.0)
        optimizer.step()
        total += loss.item()
        seen = {k: seen.get(k, 0.0) + v for k, v in log_values.items()}
        if (step + 1) % 25 == 0:
            means = {k: v / 25 for k, v in seen.items()}
            log.add(
                stage=stage.name, step=step + 1, images=(step + 1) * stage.batch, seconds=round(time.time() - began),
                loss=total / 25, **means,
            )  # fmt: skip
            total, seen = 0.0, {}
        if (step + 1) % 100 == 0 or step + 1 == stage.steps:
            save(path, stage.name, step + 1, modules, optimizer)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the log")
    parser.add_argument("--stages", default="A,A2,A3,P,B,B2,B3,S,R,R2,C,H,R3,C2,C3", help="which stages, in order")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    parser.add_argument("--start", type=Path, help="an exported model; the first of --stages starts from its weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    for name in args.stages.split(","):
        if name.startswith("A"):
            train_vision(STAGES[name], args.out, args.resume)
        else:
            from tokenprune.evals.pocket_training import joint

            if name == "S":
                joint.train_signs(STAGES[name], args.out, sys.modules[__name__])
                continue
            if name == "P":
                joint.train_projector(STAGES[name], args.out, sys.modules[__name__])
                continue
            joint.train_joint(STAGES[name], args.out, args.resume, sys.modules[__name__], args.start)
            args.start = None


if __name__ == "__main__":
    main()
