"""Trains the student of the method gtc: labels first, then a small net that predicts them from layer 0."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor

from tokenprune import __version__
from tokenprune.evals.io.atomic_files import read_lines, replace_file, replaced
from tokenprune.evals.learned.data import draw_training
from tokenprune.evals.learned.replay import greedy_answer, replay
from tokenprune.evals.learned.rollout import instruction_attention, relevance, soft_label
from tokenprune.evals.learned.settings import TrainConfig
from tokenprune.evals.models.load import LoadedModel, load_model
from tokenprune.evals.tasks.task import Sample, Task
from tokenprune.methods.gtc import CONFIG, WEIGHTS, new_student, student_scores

TEXT_RULE = "text behind the last visual token, words of the chat template among it; else the prompt's last token"
KEEP_TESTED = 16
_LABELS = "labels.jsonl"
Progress = Callable[[str], None]


@dataclass
class Example:
    """One visual of one question.

    Attributes:
        attention: `[N]` fp32, the student's input A0.
        relevance: `[N]` fp32, what its teacher says.
    """

    attention: Tensor
    relevance: Tensor


def train_gtc(config: TrainConfig, say: Progress) -> dict[str, Any]:
    """Make labels, train and check; a killed run goes on where it was. Returns what `config.json` holds.

    Raises:
        ValueError: the folder holds another run, or the model answers nothing right.
    """
    loaded = load_model(config.model, config.dtype, config.device)
    loaded.model.requires_grad_(False)
    config.claim(loaded.fingerprint)
    train, held_out, task = draw_training(config.data, config.samples, config.held_out, config.seed)
    examples = labelled(loaded, train, task, config.folder / _LABELS, say)
    checks = labelled(loaded, held_out, task, config.folder / f"held_out_{_LABELS}", say)
    if not examples or not checks:
        raise ValueError(
            f"{config.model} answered {len(examples)} of the training and {len(checks)} of the held-out visuals right, "
            "and labels are made of right answers. Ask for more --samples, or for questions that it can answer."
        )
    weights = fit(config, examples, loaded.model.device, say)
    student = agreement(checks, lambda attention: student_scores(weights, attention[None])[0])
    said = {
        "method": "gtc",
        "model": config.model,
        "weights": loaded.fingerprint,
        "data": config.data,
        "text": TEXT_RULE,
        "keep": KEEP_TESTED,
        "questions": config.samples,
        "labels": len(examples),
        "epochs": config.epochs,
        "seed": config.seed,
        "held_out": len(checks),
        "spearman": {"student": student, "layer_0": agreement(checks, lambda attention: attention)},
        "overlap": {
            "student": overlap(checks, lambda attention: student_scores(weights, attention[None])[0]),
            "layer_0": overlap(checks, lambda attention: attention),
        },
        "versions": {"tokenprune": __version__, "torch": torch.__version__},
    }
    with replaced(config.folder / WEIGHTS) as partial:
        save_file({name: value.cpu() for name, value in weights.items()}, partial)
    replace_file(config.folder / CONFIG, json.dumps(said, indent=1) + "\n")
    return said


def labelled(loaded: LoadedModel, samples: list[Sample], task: Task, path: Path, say: Progress) -> list[Example]:
    """Examples of the questions that the model answers right; lines of `path` are not made again."""
    done = _whole_lines(path)
    lines = {line["sample_id"]: line for line in done}
    with path.open("a", encoding="utf-8") as stream:
        for number, sample in enumerate(samples):
            if sample.sample_id in lines:
                continue
            lines[sample.sample_id] = line = _line(loaded, sample, task)
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            if (number + 1) % 25 == 0:
                right = sum(one["right"] for one in lines.values())
                say(f"{path.stem}: {number + 1} of {len(samples)} questions, {right} answered right")
    return [
        Example(torch.tensor(attention), torch.tensor(relevances))
        for sample in samples
        for attention, relevances in lines[sample.sample_id]["visuals"]
    ]


def _line(loaded: LoadedModel, sample: Sample, task: Task) -> dict[str, Any]:
    inputs = loaded.inputs([sample.question], [sample.image])
    answer = greedy_answer(loaded.model, inputs, task.max_new_tokens)
    right = task.mark(sample, loaded.decode(answer[None])[0]) >= 1
    visuals = []
    if right:
        replayed = replay(loaded.adapter, inputs, answer, gradients=True)
        for attention, values in zip(instruction_attention(replayed), relevance(replayed)):
            # seven digits hold an fp32 number well enough for a label
            visuals.append([[float(f"{value:.7g}") for value in part.tolist()] for part in (attention, values)])
    return {"sample_id": sample.sample_id, "right": right, "visuals": visuals}


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a labels file; one that a kill cut short is taken off it."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        replace_file(path, text[: text.rfind("\n") + 1])
    return read_lines(path)


def fit(config: TrainConfig, examples: list[Example], device: Any, say: Progress) -> dict[str, Tensor]:
    """Train a student on labels; after each epoch its state is in a checkpoint, from which a killed run goes on."""
    weights = {name: value.to(device).requires_grad_() for name, value in new_student(config.seed).items()}
    optimizer = torch.optim.Adam(weights.values(), lr=config.rate)
    steps = -(-len(examples) // config.batch_size)
    checkpoint = config.folder / f"checkpoint-{config.fitting}.safetensors"
    begun = _restore(checkpoint, weights, optimizer)
    for epoch in range(begun, config.epochs):
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(config.seed * 1009 + epoch))
        total = 0.0
        for step, batch in enumerate(order.split(config.batch_size)):
            done = (epoch * steps + step) / (config.epochs * steps)
            optimizer.param_groups[0]["lr"] = config.rate * (1 + math.cos(math.pi * done)) / 2
            attention, target, real = padded([examples[place] for place in batch.tolist()], device)
            loss = divergence(student_scores(weights, attention, real), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(batch)
        _save(checkpoint, weights, optimizer, epoch + 1)
        say(f"epoch {epoch + 1} of {config.epochs}: KL {total / len(examples):.4f}")
    return {name: value.detach() for name, value in weights.items()}


def padded(examples: list[Example], device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A0, labels R* and which places are real, `[M, N]` each, N the longest."""
    pad = torch.nn.utils.rnn.pad_sequence
    attention = pad([one.attention for one in examples], batch_first=True)
    target = pad([soft_label(one.relevance) for one in examples], batch_first=True)
    real = pad([torch.ones(len(one.attention), dtype=torch.bool) for one in examples], batch_first=True)
    return attention.to(device), target.to(device), real.to(device)


def divergence(scores: Tensor, target: Tensor) -> Tensor:
    """KL(R* || softmax of the scores), mean over the rows of `[M, N]`; where R* is 0 nothing is added."""
    predicted = scores.log_softmax(dim=1).masked_fill(target == 0, 0.0)
    return (torch.special.xlogy(target, target) - target * predicted).sum(dim=1).mean()


def agreement(examples: list[Example], score: Callable[[Tensor], Tensor]) -> float:
    """Spearman's rank correlation of scores with the teacher's relevance, mean over examples; those on which either
    says the same of all tokens have none and count 0."""
    found = []
    for one in examples:
        with torch.no_grad():
            given = score(one.attention.to(one.relevance.device)).cpu()
        ranks = 0.0
        if len(given) > 1 and given.min() < given.max() and one.relevance.min() < one.relevance.max():
            ranks = float(np.asarray(spearmanr(given.numpy(), one.relevance.numpy()))[0])
        found.append(ranks)
    return round(sum(found) / len(found), 4)


def overlap(examples: list[Example], score: Callable[[Tensor], Tensor], keep: int = KEEP_TESTED) -> float:
    """Share of the teacher's mass on the `keep` best tokens that the `keep` best by scores hold, mean over examples."""
    found = []
    for one in examples:
        with torch.no_grad():
            given = score(one.attention).cpu()
        count = min(keep, len(given))
        best = one.relevance.topk(count).values.sum()
        found.append(float(one.relevance[given.topk(count).indices].sum() / best) if best > 0 else 1.0)
    return round(sum(found) / len(found), 4)


def _save(path: Path, weights: dict[str, Tensor], optimizer: Any, epoch: int) -> None:
    state = {f"weight.{name}": value.detach() for name, value in weights.items()}
    for number, entry in optimizer.state_dict()["state"].items():
        state.update({f"adam.{number}.{name}": torch.as_tensor(value) for name, value in entry.items()})
    state["epoch"] = torch.tensor(epoch)
    with replaced(path) as partial:
        save_file({name: value.cpu().contiguous() for name, value in state.items()}, partial)


def _restore(path: Path, weights: dict[str, Tensor], optimizer: Any) -> int:
    """Bring weights and optimizer to where a checkpoint was; the epochs that are done."""
    if not path.is_file():
        return 0
    state = load_file(path)
    with torch.no_grad():
        for name, value in weights.items():
            value.copy_(state[f"weight.{name}"])
    moments = {
        number: {name: state[f"adam.{number}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
        for number in range(len(weights))
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return int(state["epoch"])
