"""Stages J: the whole model on packed questions, at first with pocket-llava's hidden states beside the answers."""

from __future__ import annotations

# layers of transformers models are untyped modules to pyright, and the recipe handles nothing else
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import random
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

from tokenprune.evals.pocket.clips import Clip, ask_clip, make_clip, still
from tokenprune.evals.pocket.easy_vqa import easy_split
from tokenprune.evals.pocket.questions import FAMILIES, Question, ask
from tokenprune.evals.pocket.scenes import PATCH, SPLIT_SEED, Scene, Thing, make_scene
from tokenprune.evals.pocket_training.packing import answer_accuracy, kept_patches
from tokenprune.evals.pocket_training.qwen.model import END, START, build_tokenizer
from tokenprune.evals.pocket_training.qwen.see import Readers, positions, targets, to_frames
from tokenprune.evals.pocket_training.qwen.tower import run_tower
from tokenprune.evals.pocket_training.qwen.transfer import FIRST, teacher_tokens, token_map

ALL_FAMILIES = (*FAMILIES, "easy_vqa", "video")
INTERVAL = 2  # M-RoPE steps from one pair of frames to the next: the processor's default of one second, times two


@lru_cache(maxsize=50_000)
def _ids(text: str) -> tuple[int, ...]:
    return tuple(build_tokenizer()(text, add_special_tokens=False).input_ids)


class Batch:
    """Packed turns about pictures, or clips, of one size.

    ``frames`` [B * grids, 2, 3, H, W]; ``kept`` [B, K] visual tokens that reach the decoder, or None; ``ids`` [B, T]
    of the turns; ``labels``, ``family`` [B, T], -100 or -1 where nothing is asked; ``mask`` [B, 1, P + T, P + T] and
    ``positions`` [3, B, P + T] of the P tokens before the turns and of the turns; ``weight`` of an answer by family.
    """

    def __init__(self, stage, step: int, split: str = "train", drop: bool | None = None, clips: bool | None = None):
        rng = random.Random(7_919 * step + stage.seed + SPLIT_SEED[split])
        share = stage.drop + (stage.drop_end - stage.drop) * step / stage.steps
        dropped, self.moving = rng.random() < share, rng.random() < stage.clips
        dropped, self.moving = dropped if drop is None else drop, self.moving if clips is None else clips
        cols, rows = self.size = rng.choice(stage.clip_sizes if self.moving else stage.sizes)
        self.grids = rng.choice(stage.grids) if self.moving else 1
        number = max(2, stage.tokens // (cols * rows * self.grids))
        start, pixels = SPLIT_SEED[split] + stage.seed + step * 32, (cols * PATCH, rows * PATCH)
        easy = int(number * stage.easy + rng.random()) if split == "train" and not self.moving else 0
        clipped = [
            make_clip(start + i, pixels, 2 * self.grids, (3, 6)) if self.moving
            else still(make_scene(start + i, pixels, stage.objects, 0.9))
            for i in range(number - easy)
        ]  # fmt: skip
        mix = {k: v for k, v in stage.mix.items() if not (dropped and k == "global")}
        turns = [_questions(clip, mix, rng) for clip in clipped]
        images = [np.stack([scene.image for scene in clip.frames]) for clip in clipped]
        shown: list[Scene | None] = [_paths(clip) for clip in clipped]
        if dropped and stage.thin and not self.moving:
            most = rng.choice((1, 2, 2, 3, 4, 6))
            for i, scene in enumerate(shown):
                if scene is not None:
                    shown[i], turns[i] = _thinned(scene, turns[i], most, rng)
        for _ in range(easy):
            extra, i = easy_split("train"), rng.randrange(len(easy_split("train").images))
            picture = extra.image(i, max(pixels))[: pixels[1], : pixels[0]]
            images.append(np.stack([picture, picture]))
            turns.append(extra.ask(i, 8, 1, rng) if cols == rows else [])
            shown.append(None)
        self.weight: dict[str, float] = stage.weight
        self.target: dict[str, Tensor] = {}
        if stage.see:
            pairs = [(clip.frames[2 * g], clip.ways) for clip in clipped for g in range(self.grids)]
            self.target = targets([scene for scene, _ in pairs], [ways for _, ways in pairs])
        self.images = np.stack(images)
        self.frames = to_frames(self.images)
        where = positions(rows, cols, self.grids, INTERVAL).expand(-1, number, -1)
        self.kept = None
        if dropped:
            kept = kept_patches(
                shown, rng.choice((0.0, 0.05, 0.1, 0.2, 0.3)), np.random.default_rng(rng.getrandbits(32))
            )
            self.kept = torch.cat([kept + rows * cols * g for g in range(self.grids)], 1)
            index = self.kept.expand(3, -1, -1) + FIRST
            where = torch.cat([where[:, :, :FIRST], where.gather(2, index)], 2)
        self._pack(turns, where, FIRST + max(rows, cols))

    def _pack(self, turns: list[list[Question]], where: Tensor, end: int) -> None:
        eos = build_tokenizer().eos_token_id
        found = [[(*_ids(q.question + " ASSISTANT:"),) for q in group] for group in turns]
        answers = [[(*_ids(" " + q.answer), eos) for q in group] for group in turns]
        lengths = [sum(len(p) + len(a) for p, a in zip(*pair)) for pair in zip(found, answers, strict=True)]
        batch, length, head = len(turns), max(lengths), where.shape[2] + 1
        self.ids = torch.zeros(batch, length, dtype=torch.long)
        self.labels, self.family = torch.full((batch, length), -100), torch.full((batch, length), -1)
        segment = torch.zeros(batch, head + length, dtype=torch.long)
        segment[:, head:] = 1_000  # padding sees itself, and what comes before the turns
        text = torch.zeros(batch, length, dtype=torch.long)
        for b, group in enumerate(turns):
            at = 0
            for k, (question, prompt, answer) in enumerate(zip(group, found[b], answers[b], strict=True)):
                n = len(prompt) + len(answer)
                self.ids[b, at : at + n] = torch.tensor([*prompt, *answer])
                first = at + len(prompt) - 1  # the label sits at the token that predicts it
                self.labels[b, first : at + n - 1] = torch.tensor(answer)
                self.family[b, first : at + n - 1] = ALL_FAMILIES.index(question.family)
                segment[b, head + at : head + at + n] = k + 1
                text[b, at : at + n] = torch.arange(n) + end + 1
                at += n
        closing = torch.full((3, batch, 1), end)
        self.positions = torch.cat([where, closing, text.expand(3, -1, -1)], 2)
        same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
        total = head + length
        self.mask = (same & torch.ones(total, total, dtype=torch.bool).tril())[:, None]


def _questions(clip: Clip, mix: dict[str, int], rng: random.Random) -> list[Question]:
    """Different questions, up to ``mix[family]`` of each family; on clips those whose answers stay the same."""
    if clip.ways:
        mix = {k: v for k, v in mix.items() if k in ("exist", "attribute", "count", "global")} | {"video": 6}
    asked = {}
    for family, number in mix.items():
        for _ in range(number):
            question = ask_clip(clip, rng) if family == "video" else ask(clip.frames[0], family, rng)
            if question is not None:
                asked.setdefault(question.question, question)
    return list(asked.values())


def _paths(clip: Clip) -> Scene:
    """The first frame with each thing's box grown to its whole path."""
    first, last = clip.frames[0], clip.frames[-1]
    things = []
    for a, b in zip(first.things, last.things, strict=True):
        box = tuple(f(x, y) for f, x, y in zip((min, min, max, max), a.box, b.box))
        things.append(Thing(a.shape, a.colour, box))
    return replace(first, things=things)


def _thinned(scene: Scene, questions: list[Question], most: int, rng: random.Random) -> tuple[Scene, list[Question]]:
    """The scene with ``most`` of its things and signs, what one of the questions needs among them, and the questions
    that these suffice for; or both as they were, where every question needs more."""
    few = [question for question in questions if len(question.boxes) <= most]
    if not few:
        return scene, questions
    every = [thing.box for thing in scene.things] + ([scene.sign_box] if scene.sign_box else [])
    kept = {tuple(map(int, box)) for box in rng.choice(few).boxes}
    for box in rng.sample(every, len(every)):
        if len(kept) < most:
            kept.add(tuple(box))
    things = [thing for thing in scene.things if thing.box in kept]
    left = [question for question in few if all(tuple(map(int, box)) in kept for box in question.boxes)]
    return replace(scene, things=things, sign_box=scene.sign_box if scene.sign_box in kept else None), left


def forward(
    model: Qwen2_5_VLForConditionalGeneration, batch: Batch, teacher=None, readers: Readers | None = None
) -> dict[str, Tensor | float]:
    """Losses and per-family accuracy of a batch; an answer counts as right if all its tokens and the end are."""
    core = model.model.language_model
    tokens = run_tower(model.model.visual, batch.frames).unflatten(0, (-1, batch.grids)).flatten(1, 2)
    inputs = _sequence(core.embed_tokens, tokens, batch, build_tokenizer().convert_tokens_to_ids, None)
    out = core(
        inputs_embeds=inputs, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False,
        output_hidden_states=teacher is not None or readers is not None,
    )  # fmt: skip
    head = inputs.shape[1] - batch.ids.shape[1]
    asked = batch.labels >= 0
    logits, labels = model.lm_head(out.last_hidden_state[:, head:][asked]), batch.labels[asked]
    weight = torch.tensor([batch.weight.get(name, 1.0) for name in ALL_FAMILIES])[batch.family[asked]]
    losses = F.cross_entropy(logits, labels, reduction="none")
    result: dict[str, Tensor | float] = {"loss": (losses * weight).sum() / weight.sum()}
    right, eos = logits.detach().argmax(-1) == labels, build_tokenizer().eos_token_id
    result |= answer_accuracy(right, labels, batch.family[asked], ALL_FAMILIES, eos)
    if teacher is not None and not batch.moving:
        result["fit"] = _fit(out.hidden_states, batch, teacher, head)
    if readers is not None and batch.target and batch.kept is None:
        placed = out.hidden_states[1][:, FIRST : head - 1].unflatten(1, (batch.grids, -1)).flatten(0, 1)
        result["see"], seen = readers.losses(placed[: len(batch.target["way"])], batch.target)
        result |= seen
    return result


def _sequence(embed, tokens: Tensor, batch: Batch, to_id, table: Tensor | None) -> Tensor:
    """Embeddings [B, P + T, width] of the prompt; ``table`` turns token ids into pocket-llava's."""
    if batch.kept is not None:
        tokens = tokens.gather(1, batch.kept[..., None].expand(-1, -1, tokens.shape[-1]))
    before = torch.tensor(build_tokenizer()("USER:" + START).input_ids)
    closing, ids = torch.tensor([to_id(END)]), batch.ids
    if table is not None:
        before, closing, ids = table[before], table[closing], table[ids]
    ends = [embed(part).expand(len(tokens), -1, -1) for part in (before, closing)]
    return torch.cat([ends[0], tokens, ends[1], embed(ids)], 1)


def _fit(states, batch: Batch, teacher: LlavaForConditionalGeneration, head: int) -> Tensor:
    """How far the decoder's hidden states at words are from the teacher's, relative to their variance."""
    core = teacher.model.language_model
    with torch.no_grad():
        images = batch.images[:, 0]
        tokens = teacher_tokens(teacher, images)
        inputs = _sequence(core.embed_tokens, tokens, batch, build_tokenizer().convert_tokens_to_ids, token_map())
        whole = images.shape[1] // PATCH * (images.shape[2] // PATCH)
        ids = torch.arange(inputs.shape[1]).expand(len(inputs), -1).clone()
        if batch.kept is not None:
            ids[:, FIRST : head - 1] = batch.kept + FIRST
        # words stand behind all patches, each turn as if it were the only one
        ids[:, head - 1 :] = batch.positions[0, :, head - 1 :] - batch.positions[0, :, head - 1 : head] + FIRST + whole
        wanted = core(
            inputs_embeds=inputs, attention_mask=batch.mask, position_ids=ids, use_cache=False,
            output_hidden_states=True,
        ).hidden_states  # fmt: skip
    where = batch.ids > 0
    off = []
    for mine, goal in list(zip(states[1:], wanted, strict=True))[1:-1]:
        goal = goal[:, head:][where]
        off.append((mine[:, head:][where] - goal).square().mean() / goal.var())
    return torch.stack(off).mean()


@torch.no_grad()
def validate(model: Qwen2_5_VLForConditionalGeneration, stage, batches: int, drop: bool = False) -> dict[str, float]:
    """Accuracy by family on validation scenes, teacher forced (equal to greedy decoding being right)."""
    totals: dict[str, list[float]] = {}
    for i in range(batches):
        for key, value in forward(model, Batch(stage, i, "val", drop, clips=i % 4 == 3)).items():
            if key in ALL_FAMILIES:
                totals.setdefault(key, []).append(float(value))
    return {key: sum(v) / len(v) for key, v in totals.items()}


def train(stage, out: Path, resume: bool, tools, model: Qwen2_5_VLForConditionalGeneration, teacher) -> None:
    """Run a stage; ``tools`` has `make_optimizer`, `learning_rate`, `save` and the log."""
    path, at, state = out / f"stage_{stage.name}.pt", 0, tools.load(out, stage, resume)
    readers = Readers(model.config.text_config.hidden_size)
    modules: dict[str, nn.Module] = {"model": model, "readers": readers}
    model.load_state_dict(state["model"])
    if "readers" in state:
        readers.load_state_dict(state["readers"])
    optimizer = tools.make_optimizer({model.model.visual: stage.tower_lr, readers: 2.0, model: 1.0})
    if state["stage"] == stage.name:
        at = state["step"]
        optimizer.load_state_dict(state["optimizer"])
    log, began, sums, counts = tools.Log(out / "log.csv"), time.time(), {}, {}
    for step in range(at, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = tools.learning_rate(step, stage.steps, stage.lr, warmup=30) * group["scale"]
        result = forward(model, Batch(stage, step), teacher if stage.fit else None, readers if stage.see else None)
        optimizer.zero_grad()
        (result["loss"] + stage.fit * result.get("fit", 0.0) + stage.see * result.get("see", 0.0)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for key, value in result.items():
            value = value.item() if isinstance(value, Tensor) else value
            sums[key], counts[key] = sums.get(key, 0.0) + value, counts.get(key, 0) + 1
        if (step + 1) % stage.every == 0:
            means = {k: v / counts[k] for k, v in sums.items()}
            log.add(stage=stage.name, step=step + 1, seconds=round(time.time() - began), **means)
            sums, counts = {}, {}
        if (step + 1) % (stage.every * 4) == 0 or step + 1 == stage.steps:
            tools.save(path, stage.name, step + 1, modules, optimizer)
        if (step + 1) % (stage.every * 8) == 0 or step + 1 == stage.steps:
            log.add(stage=stage.name + "_val", step=step + 1, **validate(model, stage, 16))
