"""Stage V: the tower and the first decoder layer learn to say of every token what pocket-llava says of its patch."""

from __future__ import annotations

# layers of transformers models are untyped modules to pyright, and the recipe handles nothing else
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

from tokenprune.evals.pocket.clips import WAYS, make_clip, still
from tokenprune.evals.pocket.easy_vqa import easy_split
from tokenprune.evals.pocket.scenes import (
    COLOURS,
    PATCH,
    PATTERNS,
    SHAPES,
    SIGN_LENGTH,
    SPLIT_SEED,
    SYMBOLS,
    Scene,
    make_scene,
)
from tokenprune.evals.pocket_training.qwen.model import MEANS, START, build_tokenizer
from tokenprune.evals.pocket_training.qwen.tower import run_tower
from tokenprune.evals.pocket_training.qwen.transfer import FIRST, rows_and_columns, teacher_tokens
from tokenprune.evals.pocket_training.vision import IMAGE_STD, _balanced, patch_targets

_TOKENS = 2304  # a step
_SPLIT = (len(SHAPES) + 1, len(COLOURS) + 1, SIGN_LENGTH * (len(SYMBOLS) + 1), len(WAYS) + 1, 1, len(PATTERNS))


class Readers(nn.Module):
    """Throw-away heads on a token: shape, colour, symbols, way of moving, centres, the background's pattern."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.out = nn.RMSNorm(width), nn.Linear(width, sum(_SPLIT))

    def losses(
        self, tokens: Tensor, target: dict[str, Tensor], sign_weight: float = 1.0
    ) -> tuple[Tensor, dict[str, float]]:
        """``tokens`` [B, N, width] -> loss, and the accuracy of each head on what is not background."""
        shape, colour, sign, way, centre, pattern = self.out(self.norm(tokens)).split(_SPLIT, -1)
        sign = sign.unflatten(-1, (SIGN_LENGTH, -1))
        loss = F.binary_cross_entropy_with_logits(
            centre.squeeze(-1), target["centre"], pos_weight=torch.tensor(5.0)
        )  # fmt: skip
        wide = target["pattern"][:, None].expand(-1, tokens.shape[1])
        loss = loss + F.cross_entropy(pattern.flatten(0, 1), wide.flatten())
        loss = loss + F.cross_entropy(pattern.mean(1), target["pattern"])
        seen = {"pattern": (pattern.argmax(-1) == wide).float().mean().item()}
        asked = (
            ("shape", shape, len(SHAPES)), ("colour", colour, len(COLOURS)), ("sign", sign, len(SYMBOLS)),
            ("way", way, len(WAYS)),
        )  # fmt: skip
        for name, logits, none in asked:
            fore = target[name] != none
            weight = sign_weight if name == "sign" else 3.0 if name == "way" and fore.any() else 1.0
            loss = loss + weight * _balanced(logits, target[name], none)
            if fore.any():
                seen[name] = (logits.argmax(-1)[fore] == target[name][fore]).float().mean().item()
        return loss, seen


class Batch:
    """Pictures of one size: ``frames`` [B, 2, 3, H, W], ``teacher`` [B, N, width], ``target`` of `Readers`."""

    def __init__(self, stage, step: int, teacher: LlavaForConditionalGeneration, split: str = "train") -> None:
        rng = random.Random(1_000_003 * step + stage.seed)
        moving = rng.random() < stage.clips
        self.size = rng.choice(stage.clip_sizes if moving else stage.sizes)
        pixels = (self.size[0] * PATCH, self.size[1] * PATCH)
        number = _TOKENS // (self.size[0] * self.size[1])
        start = SPLIT_SEED[split] + stage.seed + step * 32
        pairs, ways = [], []
        for i in range(number):
            if moving:
                clip = make_clip(start + i, pixels, 4, (4, 7))
                at = 2 * rng.randrange(2)
                pairs.append(clip.frames[at : at + 2])
            else:
                clip = still(make_scene(start + i, pixels, stage.objects, 0.9))
                pairs.append(clip.frames)
            ways.append(clip.ways)
        self.target = targets([pair[0] for pair in pairs], ways)
        images = np.stack([[scene.image for scene in pair] for pair in pairs])
        extra = easy_split("train")
        side = max(pixels)
        more = [
            extra.image(rng.randrange(len(extra.images)), side)[: pixels[1], : pixels[0]]
            for _ in range(int(stage.easy))
        ]
        if more:
            images = np.concatenate([images, np.stack([[image, image] for image in more])])
        self.frames = to_frames(images)
        with torch.no_grad():
            self.teacher = teacher_tokens(teacher, images[:, 0])


def targets(scenes: list[Scene], ways: list[dict[int, str]]) -> dict[str, Tensor]:
    """What `Readers` shall say of each token of scenes of one size, whose things move in ``ways``."""
    found = [patch_targets(scene) for scene in scenes]
    stacked = {key: torch.from_numpy(np.stack([one[key] for one in found])) for key in found[0]}
    return stacked | {"way": torch.stack([_ways(scene, way) for scene, way in zip(scenes, ways, strict=True)])}


def _ways(scene: Scene, ways: dict[int, str]) -> Tensor:
    """[N]: how what a token shows moves, an index into `WAYS`, or their number."""
    rows, cols = scene.height // PATCH, scene.width // PATCH
    cells = scene.owner.reshape(rows, PATCH, cols, PATCH).transpose(0, 2, 1, 3).reshape(rows * cols, -1)
    out = torch.full((rows * cols,), len(WAYS))
    for index, way in ways.items():
        out[torch.from_numpy((cells == index + 1).sum(1) >= 10)] = list(WAYS).index(way)
    return out


def to_frames(images: np.ndarray) -> Tensor:
    """[B, F, H, W, 3] uint8 -> normalised pairs of frames [B * F / 2, 2, 3, H, W]."""
    means = torch.tensor(MEANS)[:, None, None]
    pixels = torch.from_numpy(images.reshape(-1, *images.shape[2:])).permute(0, 3, 1, 2).float()
    return ((pixels / 255 - means) / IMAGE_STD).unflatten(0, (-1, 2))


def positions(rows: int, cols: int, grids: int = 1, interval: int = 0) -> Tensor:
    """M-RoPE ids [3, 1, FIRST + grids * rows * cols] of the tokens before a picture or clip and of its own."""
    row, col = rows_and_columns(rows, cols)
    time_ids = (torch.arange(grids) * interval).repeat_interleave(len(row))
    own = torch.stack([time_ids, row.repeat(grids), col.repeat(grids)]) + FIRST
    return torch.cat([torch.arange(FIRST).expand(3, -1), own], 1)[:, None]


def place(model: Qwen2_5_VLForConditionalGeneration, tokens: Tensor, rows: int, cols: int) -> Tensor:
    """Tokens [B, N, width] of the tower as they leave the first decoder layer."""
    core = model.model.language_model
    ids = torch.tensor(build_tokenizer()("USER:" + START).input_ids)
    x = torch.cat([core.embed_tokens(ids).expand(len(tokens), -1, -1), tokens], 1)
    rotary = core.rotary_emb(x, positions(rows, cols))
    return core.layers[0](x, attention_mask=None, position_embeddings=rotary)[:, FIRST:]


def ways_words(model: Qwen2_5_VLForConditionalGeneration) -> Tensor:
    """[ways + 1, width]: what is added to the teacher's word on a token for the way in which it moves."""
    ids = build_tokenizer().convert_tokens_to_ids(["\u0120" + way for way in WAYS])
    words = model.get_input_embeddings().weight.detach()[ids].clone()
    words[:, 0] = 0
    return torch.cat([0.7 * words, torch.zeros(1, words.shape[1])])


def train(stage, out: Path, resume: bool, tools, model: Qwen2_5_VLForConditionalGeneration, teacher) -> None:
    """Run the stage; ``tools`` has `make_optimizer`, `learning_rate`, `save` and the log."""
    readers = Readers(model.config.text_config.hidden_size)
    tower, first = model.model.visual, model.model.language_model.layers[0]
    modules: dict[str, nn.Module] = {"model": model, "readers": readers}
    path, at = out / f"stage_{stage.name}.pt", 0
    state = tools.load(out, stage, resume)
    for name, module in modules.items():
        if state and name in state:
            module.load_state_dict(state[name])
    optimizer = tools.make_optimizer({tower: 1.0, first: 0.5, readers: 1.0})
    if state and state["stage"] == stage.name:
        at = state["step"]
        optimizer.load_state_dict(state["optimizer"])
    words, log = ways_words(model), tools.Log(out / "log.csv")
    began, sums, counts = time.time(), {}, {}
    for step in range(at, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = tools.learning_rate(step, stage.steps, stage.lr) * group["scale"]
        batch = Batch(stage, step, teacher)
        cols, rows = batch.size
        tokens = place(model, run_tower(tower, batch.frames), rows, cols)
        wanted = batch.teacher.clone()
        n = len(batch.target["way"])
        wanted[:n] += words[batch.target["way"]]
        off = (tokens - wanted).square().mean(-1) / wanted.var()
        fore = torch.ones_like(off)
        fore[:n] = 0.3 + ((batch.target["shape"] != len(SHAPES)) | (batch.target["sign"] != len(SYMBOLS)).any(-1)) * 2.0
        fit = (off * fore).sum() / fore.sum()
        loss, seen = readers.losses(tokens[:n], batch.target, stage.sign)
        optimizer.zero_grad()
        (stage.fit * fit + loss).backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 2.0)
        optimizer.step()
        for key, value in {"loss": loss.item(), "fit": fit.item(), **seen}.items():
            sums[key], counts[key] = sums.get(key, 0.0) + value, counts.get(key, 0) + 1
        if (step + 1) % stage.every == 0:
            log.add(stage=stage.name, step=step + 1, seconds=round(time.time() - began),
                    **{k: v / counts[k] for k, v in sums.items()})  # fmt: skip
            sums, counts = {}, {}
        if (step + 1) % (4 * stage.every) == 0 or step + 1 == stage.steps:
            tools.save(path, stage.name, step + 1, modules, optimizer)
