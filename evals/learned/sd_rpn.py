"""Trains the branch of the method sd_rpn: the model's attention makes labels, copies of its layers learn them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from scipy.stats import rankdata
from torch import Tensor

from tokenprune import __version__
from tokenprune.capture.branch import CONFIG, WEIGHTS, Branch, save_branch
from tokenprune.engine.prompt_reader import PromptReader
from tokenprune.evals.io.atomic_files import replace_file, replaced
from tokenprune.evals.learned.data import draw_training
from tokenprune.evals.learned.region_labels import (
    IGNORE,
    answer_attention,
    choose_heads,
    raw_map,
    region_loss,
    sinks,
    tri_state,
)
from tokenprune.evals.learned.replay import greedy_answer, replay
from tokenprune.evals.learned.settings import TrainConfig
from tokenprune.evals.models.load import LoadedModel, load_model
from tokenprune.evals.tasks.task import Sample, Task
from tokenprune.methods.sd_rpn import default_place
from tokenprune.state.call_inputs import CallInputs

Progress = Callable[[str], None]


@dataclass
class Region:
    """One picture of one question.

    Attributes:
        sample: the question.
        maps: `[L, H, N]`, where each head looked.
        grid: (rows, cols) of its tokens.
        label: `[N]` int64, see `tri_state`.
    """

    sample: Sample
    maps: Tensor
    grid: tuple[int, int]
    label: Tensor | None = None


class _Entered(Exception):
    """Layer K was reached, and need not run."""


def train_sd_rpn(config: TrainConfig, say: Progress) -> dict[str, Any]:
    """Make labels, train and check; a killed run goes on where it was. Returns what `config.json` holds.

    Raises:
        ValueError: the folder holds another run, or no label came out.
    """
    loaded = load_model(config.model, config.dtype, config.device)
    loaded.model.requires_grad_(False)
    config.claim(loaded.fingerprint)
    train, held_out, task = draw_training(config.data, config.samples, config.held_out, config.seed)
    examples = mapped(loaded, train, task, config.folder / "maps", say)
    checks = mapped(loaded, held_out, task, config.folder / "held_out_maps", say)
    heads = choose_heads([one.maps for one in examples])
    for one in [*examples, *checks]:
        one.label = tri_state(raw_map(one.maps, heads), sinks(one.maps), one.grid)
    usable = [one for one in examples if one.label is not None and bool((one.label != IGNORE).any())]
    known = [one for one in checks if one.label is not None and bool((one.label == 1).any())]
    if not usable or not known:
        raise ValueError(
            f"{len(usable)} of {len(examples)} training and {len(known)} of {len(checks)} held-out pictures have a "
            "label: elsewhere the answers looked at half of the picture or more. Ask for more --samples."
        )
    layer, layers = default_place(loaded.adapter.depths)
    branch = Branch(loaded.adapter, layer, layers)
    before = separation(loaded, branch, layer, known)
    fit(config, loaded, branch, layer, usable, say)
    said = {
        "method": "sd_rpn",
        "model": config.model,
        "weights": loaded.fingerprint,
        "data": config.data,
        "layer": layer,
        "layers": layers,
        "heads": heads,
        "questions": config.samples,
        "labels": len(usable),
        "epochs": config.epochs,
        "seed": config.seed,
        "held_out": len(known),
        "separation": {"branch": separation(loaded, branch, layer, known), "own layers": before},
        "versions": {"tokenprune": __version__, "torch": torch.__version__},
    }
    with replaced(config.folder / WEIGHTS) as partial:
        save_branch(branch, partial)
    replace_file(config.folder / CONFIG, json.dumps(said, indent=1) + "\n")
    return said


def mapped(loaded: LoadedModel, samples: list[Sample], task: Task, folder: Path, say: Progress) -> list[Region]:
    """Where the answer to each question looked, of those on one picture of one grid; files there are not made again."""
    folder.mkdir(exist_ok=True)
    found = []
    for number, sample in enumerate(samples):
        path = folder / f"{sample.sample_id}.safetensors"
        if not path.is_file():
            with replaced(path) as partial:
                save_file(_maps(loaded, sample, task), partial)
        stored = load_file(path)
        if stored["grid"].numel():
            grid = (int(stored["grid"][0]), int(stored["grid"][1]))
            found.append(Region(sample, stored["maps"], grid))
        if (number + 1) % 25 == 0:
            say(f"{folder.name}: {number + 1} of {len(samples)} questions")
    return found


def _maps(loaded: LoadedModel, sample: Sample, task: Task) -> dict[str, Tensor]:
    nothing = {"maps": torch.empty(0), "grid": torch.empty(0, dtype=torch.int64)}
    if isinstance(sample.image, (list, tuple)):
        return nothing  # a video, or several pictures
    inputs = loaded.inputs([sample.question], [sample.image])
    prompt = PromptReader(loaded.adapter).read_alone(CallInputs(inputs))
    rasters = () if prompt is None else prompt.layout.spans[0].visual.rasters
    if len(rasters) != 1:
        return nothing  # crops
    answer = greedy_answer(loaded.model, inputs, task.max_new_tokens)
    replayed = replay(loaded.adapter, inputs, answer, gradients=False)
    return {"maps": answer_attention(replayed).cpu().contiguous(), "grid": torch.tensor(rasters[0].grid)}


def fit(
    config: TrainConfig, loaded: LoadedModel, branch: Branch, layer: int, examples: list[Region], say: Progress
) -> None:
    """Train a branch on labels, the model frozen; after each epoch its state is in a checkpoint, from which a killed
    run goes on."""
    branch.requires_grad_(True)
    trained = list(branch.parameters())
    optimizer = torch.optim.AdamW(trained, lr=config.rate, weight_decay=0.0)
    checkpoint = config.folder / f"checkpoint-{config.fitting}.pt"
    steps = -(-len(examples) // config.batch_size)
    begun = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        branch.load_state_dict(state["branch"])
        optimizer.load_state_dict(state["optimizer"])
        begun = state["epoch"]
    for epoch in range(begun, config.epochs):
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(config.seed * 1009 + epoch))
        total = 0.0
        for step, batch in enumerate(order.split(config.batch_size)):
            done = (epoch * steps + step) / (config.epochs * steps)
            warm = min(1.0, (epoch * steps + step + 1) / max(1.0, 0.03 * config.epochs * steps))
            optimizer.param_groups[0]["lr"] = config.rate * warm * (1 + math.cos(math.pi * done)) / 2
            optimizer.zero_grad()
            for place in batch.tolist():
                one = examples[place]
                loss = region_loss(region_logits(loaded, branch, layer, one.sample), _label(one, loaded))
                (loss / len(batch)).backward()
                total += float(loss.detach())
            optimizer.step()
        with replaced(checkpoint) as partial:
            torch.save(
                {"branch": branch.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, partial
            )
        say(f"epoch {epoch + 1} of {config.epochs}: loss {total / len(examples):.4f}")
    branch.requires_grad_(False)


def _label(one: Region, loaded: LoadedModel) -> Tensor:
    if one.label is None:
        raise ValueError(f"{one.sample.sample_id} has no label.")
    return one.label.to(loaded.model.device)


def region_logits(loaded: LoadedModel, branch: Branch, layer: int, sample: Sample) -> Tensor:
    """`[N]` fp32: what the branch says of the tokens of a question's picture; the model runs up to layer K."""
    adapter = loaded.adapter
    inputs = loaded.inputs([sample.question], [sample.image])
    prompt = PromptReader(adapter).read_alone(CallInputs(inputs))
    if prompt is None:
        raise ValueError(f"{sample.sample_id} shows no picture.")
    found: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []

    def stop(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"]))
        raise _Entered

    hook = adapter.layers[layer].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            loaded.model(**inputs, use_cache=False)
    except _Entered:
        pass
    finally:
        hook.remove()
    hidden, rotation = found[0]
    logits, _ = branch.logits(hidden, rotation, None, torch.tensor([hidden.shape[1] - 1], device=hidden.device))
    span = prompt.layout.spans[0]
    places = span.places if span.visual.offsets is None else span.places[span.visual.offsets]
    return logits[0, places.to(logits.device)]


def separation(loaded: LoadedModel, branch: Branch, layer: int, examples: list[Region]) -> float:
    """How often a foreground cell has a higher logit than a background cell of its picture (area under the ROC curve),
    mean over pictures."""
    found = []
    for one in examples:
        with torch.no_grad():
            logits = region_logits(loaded, branch, layer, one.sample).cpu()
        label = _label(one, loaded).cpu()
        front, known = label == 1, label != IGNORE
        positive, negative = int(front.sum()), int((known & ~front).sum())
        if positive and negative:
            ranks = torch.from_numpy(rankdata(logits[known].numpy()))
            above = float(ranks[front[known]].sum()) - positive * (positive + 1) / 2
            found.append(above / (positive * negative))
    return round(sum(found) / max(1, len(found)), 4)
