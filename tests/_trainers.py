"""Short training runs of tiny models on random pictures, pruned and masked, and what is compared of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _families import BUILDERS, batch_of
from _masked_twin import masked
from _processors import save_checkpoint
from torch import Tensor

import tokenprune

METHODS = ["vtc_cls@9", "uniform@9", "fastv@9"]
QUESTIONS = ["what is this", "where", "who is red", "is one blue or two"]
PLAIN = {
    "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "max_steps": 2,
    "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "disable_tqdm": True,
    "per_device_train_batch_size": 2, "remove_unused_columns": False, "seed": 3,
}  # fmt: skip
"""SGD without clipping: a step is then as small or large as the gradient, and noise in it stays noise."""


@dataclass
class Run:
    """What one run left: the logs of its steps, and the weights it ended with."""

    logs: list[dict[str, float]]
    weights: dict[str, Tensor]


Train = Callable[[Any, Path], Any]
"""Makes a trainer of a model, writing to a folder."""


def processor_of(name: str, folder: Path) -> Any:
    """The processor of a tiny family, from a folder laid out as the hub's."""
    from transformers import AutoProcessor

    save_checkpoint(name, folder)
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    return processor


def pictures(count: int) -> list[Any]:
    """Random pictures for either family: 42 x 42 is 36 tokens for the LLaVA."""
    from PIL import Image

    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (42, 42, 3), dtype=np.uint8)) for _ in range(count)]


def say(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def batches(name: str, side: str) -> list[dict[str, Any]]:
    """Two batches, labelled where there is text or a picture."""
    found = []
    for seed in (1, 2):
        batch = batch_of(name, f"ragged_{side}", seed)
        found.append({**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)})
    return found


def trainer_of(model: Any, folder: Path, name: str, side: str, metrics: Any = None, **settings: Any) -> Any:
    """A trainer that is handed whole batches."""
    from transformers import Trainer, TrainingArguments

    chosen = {**PLAIN, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, **settings}
    arguments = TrainingArguments(output_dir=str(folder), **chosen)
    rows = batches(name, side)
    return Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=lambda rows: dict(rows[0]),
        compute_metrics=metrics,
    )  # fmt: skip


def run(trainer: Any, model: Any) -> Run:
    """Train, and note what came of it."""
    trainer.train()
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return Run([entry for entry in trainer.state.log_history if "loss" in entry], weights)


@contextmanager
def _seeded() -> Iterator[None]:
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


def pruned_and_masked(
    name: str, method: str, make: Train, folder: Path, prepare: Callable[[Any], Any] = lambda model: model
) -> tuple[Run, Run, Any]:
    """The same run on a pruned model and on its masked twin.

    Args:
        name: the family.
        make: makes the trainer.
        prepare: wraps a fresh model before anything else; the wrapped one is what is trained.

    Returns:
        The two runs, and the views of the pruned model's prompts.
    """
    with _seeded():
        model = prepare(BUILDERS[name]())
        handle = tokenprune.apply(model, method)
        with handle.watch() as passes:
            pruned = run(make(model, folder / "pruned"), model)
        policies = {stage.site: str(stage.pruner.positions) for stage in handle.stages}
        handle.remove()
    with _seeded():
        twin = prepare(BUILDERS[name]())
        adapter = tokenprune.api.adapter_for(tokenprune.api.unwrap(twin))
        with masked(adapter.model, adapter, passes, policies) as coming:
            truth = run(make(twin, folder / "masked"), twin)
        assert not coming, "the masked model was called less often than the pruned one"
    return pruned, truth, passes


def compare(pruned: Run, truth: Run, names: tuple[str, ...] = (), tolerance: float = 1e-5) -> None:
    """Two steps each, with the same losses, gradients and weights."""
    assert len(pruned.logs) == len(truth.logs) == 2
    for own, right in zip(pruned.logs, truth.logs):
        for key in ("loss", "grad_norm", *names):
            assert abs(own[key] - right[key]) <= tolerance * abs(right[key]) + 1e-7, (key, own[key], right[key])
        assert right["grad_norm"] > 1e-3, "nothing is trained"
    moved = torch.cat([value.flatten() for value in truth.weights.values()])
    ended = torch.cat([value.flatten() for value in pruned.weights.values()])
    assert float((ended - moved).norm() / moved.norm()) < tolerance
