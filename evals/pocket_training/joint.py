"""Stages B and C: the whole model on packed questions (see ``train.py`` for the recipe and the command)."""

from __future__ import annotations

# layers of transformers models are untyped modules to pyright, and the recipe handles nothing else
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import copy
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from tokenprune.evals.pocket.easy_vqa import easy_split
from tokenprune.evals.pocket.questions import FAMILIES
from tokenprune.evals.pocket.scenes import PATCH, SHAPES, SPLIT_SEED, SYMBOLS, Scene, make_scene
from tokenprune.evals.pocket_training.alignment import PatchWords, SignWords, start_ground, structured_start
from tokenprune.evals.pocket_training.model import build_llava
from tokenprune.evals.pocket_training.packing import (
    NO_PLACE,
    Packed,
    Turn,
    answer_accuracy,
    easy_turns,
    kept_patches,
    pack,
    prefix_ids,
    scene_turns,
    tokenizer,
)  # fmt: skip
from tokenprune.evals.pocket_training.vision import (
    GRID,
    Heads,
    build_tower,
    patch_targets,
    run_tower,
    to_pixels,
    vision_losses,
    window_positions,
)  # fmt: skip

ALL_FAMILIES = (*FAMILIES, "easy_vqa")
GROUND_LAYER = 4  # the decoder layer whose output must know where the thing is that a word names


class Ground(nn.Module):
    """Throw-away heads: from the hidden state at an object's word to its centre's column and row (24 and "none").

    And from the state where a relation is answered to the places of both things that it is about.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.out = nn.Linear(width, 2 * (NO_PLACE + 1))
        self.pair = nn.Linear(width, 4 * (NO_PLACE + 1))
        nn.init.normal_(self.pair.weight, std=0.005)

    def pair_loss(self, hidden: Tensor, places: Tensor) -> Tensor:
        """``hidden`` [R, width] where a relation is answered, ``places`` [R, 4] of its two things -> loss."""
        # times ten: near places differ little in their codes, so the weights must grow large, and fast
        logits = (10 * self.pair(self.norm(hidden))).unflatten(-1, (4, NO_PLACE + 1))
        return F.cross_entropy(logits.flatten(0, 1), places.flatten())

    def loss(self, hidden: Tensor, places: Tensor) -> tuple[Tensor, float]:
        """``hidden`` [M, width], ``places`` [M, 2] (column, row) -> loss and accuracy."""
        logits = self.out(self.norm(hidden)).unflatten(-1, (2, NO_PLACE + 1))
        hit = (logits.argmax(-1) == places).all(-1).float().mean().item()
        return F.cross_entropy(logits.flatten(0, 1), places.flatten()), hit


class Batch:
    """One training batch: pixels, tower positions, scenes, kept patches (None: all) and packed turns."""

    def __init__(self, stage, step: int, split: str = "train", drop: bool | None = None) -> None:
        rng = random.Random(7_919 * step + stage.seed + SPLIT_SEED[split])
        start = SPLIT_SEED[split] + stage.seed + step * stage.batch
        easy = int(stage.batch * stage.easy + rng.random()) if split == "train" else 0
        side = stage.size // PATCH
        share = stage.drop + (stage.drop_end - stage.drop) * step / stage.steps
        self.dropped = rng.random() < share if drop is None else drop
        self.scenes: list[Scene | None] = [
            make_scene(start + i, stage.size, stage.objects, 0.9) for i in range(stage.batch - easy)
        ]
        corners = [(rng.randint(0, GRID - side), rng.randint(0, GRID - side)) for _ in range(stage.batch)]
        # what the dropped background shows must not be asked for
        mix = {k: v for k, v in stage.mix.items() if not (self.dropped and k == "global")}
        turns: list[list[Turn]] = [
            scene_turns(scene, mix, corner, rng) for scene, corner in zip(self.scenes, corners, strict=False)
        ]
        images = [scene.image for scene in self.scenes]
        for _ in range(easy):
            i = rng.randrange(len(easy_split("train").images))
            turns.append(easy_turns(i, 12, stage.size, rng))
            images.append(easy_split("train").image(i, stage.size))
            self.scenes.append(None)
        self.pixels = to_pixels(np.stack(images))
        self.tower_positions = window_positions(torch.tensor(corners), side)
        before = len(prefix_ids()[0])
        self.kept, image_positions = None, torch.arange(side * side).expand(stage.batch, -1)
        end = before + side * side
        if self.dropped:
            share = rng.choice((0.0, 0.05, 0.1, 0.2, 0.3))
            self.kept = kept_patches(self.scenes, share, np.random.default_rng(rng.getrandbits(32)))
            compact = rng.random() < 0.5  # pruners either close the gaps in the positions or leave them
            image_positions = torch.arange(self.kept.shape[1]).expand(stage.batch, -1) if compact else self.kept
            end = before + (self.kept.shape[1] if compact else side * side)
        self.packed: Packed = pack(turns, image_positions + before, end, ALL_FAMILIES)
        self.targets: dict[str, Tensor] = {}
        if stage.vision > 0:
            found = [patch_targets(scene) for scene in self.scenes if scene is not None]
            self.targets = {key: torch.from_numpy(np.stack([t[key] for t in found])) for key in found[0]}


def forward(
    model: LlavaForConditionalGeneration,
    batch: Batch,
    ground: Ground | None = None,
    vision: Heads | None = None,
    shape_weight: float = 1.0,
    frozen: bool = False,
) -> dict[str, Tensor | float]:
    """Losses and per-family accuracy of a batch; an answer counts as right if all its tokens and the end are."""
    core, packed = model.model, batch.packed
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        states = run_tower(core.vision_tower, batch.pixels, batch.tower_positions, last=vision is not None)
    patches = states[0][:, 1:]
    if batch.kept is not None:
        patches = patches.gather(1, batch.kept[..., None].expand(-1, -1, patches.shape[-1]))
    image = core.multi_modal_projector(patches)
    embed = core.language_model.embed_tokens
    before, after = (embed(torch.tensor(part)).expand(len(image), -1, -1) for part in prefix_ids())
    inputs = torch.cat([before, image, after, embed(packed.ids)], 1)
    out = core.language_model(
        inputs_embeds=inputs, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False,
        output_hidden_states=ground is not None,
    )  # fmt: skip
    head = inputs.shape[1] - packed.ids.shape[1]
    asked = packed.labels >= 0
    logits, labels = model.lm_head(out.last_hidden_state[:, head:][asked]), packed.labels[asked]
    weight = torch.ones(len(ALL_FAMILIES))
    for name in ("read", "global"):  # only one such question an image
        weight[ALL_FAMILIES.index(name)] = 3.0
    weight = weight[packed.family[asked]]
    losses = F.cross_entropy(logits, labels, reduction="none")
    result: dict[str, Tensor | float] = {"answer_loss": (losses * weight).sum() / weight.sum()}
    with torch.no_grad():
        right, eos = logits.argmax(-1) == labels, tokenizer().eos_token_id
        result |= answer_accuracy(right, labels, packed.family[asked], ALL_FAMILIES, eos)
    if ground is not None and len(packed.places):
        b, t, col, row = packed.places.unbind(1)
        hidden = out.hidden_states[GROUND_LAYER][b, head + t]
        result["ground_loss"], result["ground"] = ground.loss(hidden, torch.stack([col, row], 1))
        b, t = packed.pairs[:, 0], packed.pairs[:, 1]
        if len(b):
            hidden = out.hidden_states[GROUND_LAYER][b, head + t]
            result["pair_loss"] = ground.pair_loss(hidden, packed.pairs[:, 2:])
    if vision is not None:
        n = len(batch.targets["n"])
        loss, seen = vision_losses(
            vision, [s[:n] for s in states], batch.tower_positions[:n], batch.targets, shape_weight
        )
        result["vision_loss"] = loss
        result |= {k: seen[k] for k in ("shape", "colour", "sign", "penultimate_f1")}
    return result


def start_model(tower_state: dict[str, Tensor]) -> LlavaForConditionalGeneration:
    """A fresh whole model around a trained tower; the projector is scaled so that image and word embeddings match."""
    tower = build_tower()
    tower.load_state_dict(tower_state)
    model = build_llava(tower, tokenizer())
    scenes = [make_scene(SPLIT_SEED["val"] + 900_000 + i, 168, (3, 7)) for i in range(16)]
    with torch.no_grad():
        positions = window_positions(torch.full((16, 2), 6), 12)
        patches = run_tower(tower, to_pixels(np.stack([s.image for s in scenes])), positions, last=False)[0][:, 1:]
        projector = model.model.multi_modal_projector
        projector.linear_1.weight /= projector.linear_1(patches).std()
        projector.linear_2.weight *= 0.5 / projector(patches).std()
    return model


def validate(model: LlavaForConditionalGeneration, stage, batches: int, drop: bool) -> dict[str, float]:
    """Accuracy by family on validation scenes, teacher forced (equal to greedy decoding being right)."""
    model.eval()
    totals: dict[str, list[float]] = {}
    with torch.no_grad():
        for i in range(batches):
            for key, value in forward(model, Batch(stage, i, "val", drop)).items():
                if key in ALL_FAMILIES:
                    totals.setdefault(key, []).append(float(value))
    model.train()
    return {key: sum(v) / len(v) for key, v in totals.items()}


def train_projector(stage, out: Path, tools) -> None:
    """Stage P: the projector alone, on a frozen tower (see ``alignment.py``)."""
    state = torch.load(out / f"stage_{stage.after}.pt", weights_only=True)
    model = start_model(state["tower"])
    heads, log, total = Heads(model.config.vision_config.hidden_size), tools.Log(out / "log.csv"), 0.0
    heads.load_state_dict(state["heads"])
    structured_start(model)
    words, projector = PatchWords(model), model.model.multi_modal_projector
    optimizer = tools.make_optimizer({projector: 1.0})
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = tools.learning_rate(step, stage.steps, stage.lr, warmup=10)
        pixels, positions, target, _, _ = tools.vision_batch(stage, step, easy=0)
        with torch.no_grad():
            patches = run_tower(model.model.vision_tower, pixels, positions, last=False)[0][:, 1:]
            wanted = words(target, positions)
        off = ((projector(patches) - wanted).square() * words.weight).mean(-1)
        shown = (target["shape"] != len(SHAPES)) | (target["sign"] != len(SYMBOLS)).any(-1)
        loss = off[shown].mean() + 0.3 * off[~shown].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
        if (step + 1) % stage.every == 0:
            log.add(stage=stage.name, step=step + 1, images=(step + 1) * stage.batch, loss=total / stage.every)
            total = 0.0
    tools.save(out / f"stage_{stage.name}.pt", stage.name, stage.steps, {"model": model, "heads": heads}, optimizer)


def train_signs(stage, out: Path, tools) -> None:
    """Stage S: the projector alone, towards new embeddings of the sign's patches; all others stay where they are."""
    state = torch.load(out / f"stage_{stage.after}.pt", weights_only=True)
    model = build_llava(build_tower(), tokenizer())
    model.load_state_dict(state["model"])
    words, projector, log, total = SignWords(model), model.model.multi_modal_projector, tools.Log(out / "log.csv"), 0.0
    before = copy.deepcopy(projector)
    optimizer = tools.make_optimizer({projector: 1.0})
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = tools.learning_rate(step, stage.steps, stage.lr, warmup=10)
        pixels, positions, target, _, _ = tools.vision_batch(stage, step, easy=0)
        with torch.no_grad():
            patches = run_tower(model.model.vision_tower, pixels, positions, last=False)[0][:, 1:]
            wanted, signed = words(before(patches), target)
        off = (projector(patches) - wanted).square().mean(-1)
        loss = off[signed].mean() + off[~signed].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
        if (step + 1) % stage.every == 0:
            log.add(stage=stage.name, step=step + 1, images=(step + 1) * stage.batch, loss=total / stage.every)
            total = 0.0
    kept = {
        "heads": Heads(model.config.vision_config.hidden_size),
        "ground": Ground(model.config.text_config.hidden_size),
    }
    for name, module in kept.items():
        module.load_state_dict(state[name])
    tools.save(out / f"stage_{stage.name}.pt", stage.name, stage.steps, {"model": model, **kept}, optimizer)


def train_joint(stage, out: Path, resume: bool, tools, start: Path | None = None) -> None:
    """Stages B to C2. ``tools`` is the ``train`` module (optimiser, schedule, log, checkpoints).

    ``start``: an exported model to start from, without heads, in place of the checkpoint of ``stage.after``.
    """
    path, log, first = out / f"stage_{stage.name}.pt", tools.Log(out / "log.csv"), 0
    begun = resume and path.exists()
    if begun or start is None:
        state = torch.load(path if begun else out / f"stage_{stage.after}.pt", weights_only=True)
    else:
        state = {"model": LlavaForConditionalGeneration.from_pretrained(start, dtype="float32").state_dict()}
    model = build_llava(build_tower(), tokenizer())
    heads, ground = Heads(model.config.vision_config.hidden_size), Ground(model.config.text_config.hidden_size)
    start_ground(ground.out.weight)
    modules: dict[str, nn.Module] = {"model": model, "heads": heads, "ground": ground}
    for name, module in modules.items():
        if name in state:
            module.load_state_dict(state[name], strict=name != "ground")
    model.requires_grad_(not stage.heads_only)
    # new linear heads learn fast; what the tower and the projector know already is kept by learning slowly
    slow, fast = stage.tower_lr, stage.head_lr
    parts = {model.model.vision_tower: slow, model.model.multi_modal_projector: max(slow, 0.4), heads: slow}
    optimizer = tools.make_optimizer(parts | {model.lm_head: fast, ground: fast, model: 1.0})
    if begun:
        first = state["step"]
        optimizer.load_state_dict(state["optimizer"])
    model.train()
    began, sums, counts = time.time(), {}, {}
    for step in range(first, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = tools.learning_rate(step, stage.steps, stage.lr, warmup=30) * group["scale"]
        batch = Batch(stage, step)
        result = forward(model, batch, ground, heads if stage.vision > 0 else None, stage.shape, stage.tower_lr == 0)
        loss = result["answer_loss"] + stage.ground * result.get("ground_loss", 0.0)
        loss = loss + stage.ground * result.get("pair_loss", 0.0) + stage.vision * result.get("vision_loss", 0.0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for m in modules.values() for p in m.parameters()], 1.0)
        optimizer.step()
        for key, value in result.items():
            sums[key], counts[key] = sums.get(key, 0.0) + float(torch.as_tensor(value).detach()), counts.get(key, 0) + 1
        if (step + 1) % stage.every == 0:
            means = {k: v / counts[k] for k, v in sums.items()}
            log.add(
                stage=stage.name, step=step + 1, images=(step + 1) * stage.batch, seconds=round(time.time() - began),
                loss=means.pop("answer_loss"), **means,
            )  # fmt: skip
            sums, counts = {}, {}
        if (step + 1) % (stage.every * 4) == 0 or step + 1 == stage.steps:
            tools.save(path, stage.name, step + 1, modules, optimizer)
        if (step + 1) % (stage.every * 8) == 0 or step + 1 == stage.steps:
            seen = validate(model, stage, max(1, 48 // stage.batch), False)
            log.add(stage=stage.name + "_val", step=step + 1, images=(step + 1) * stage.batch, **seen)
