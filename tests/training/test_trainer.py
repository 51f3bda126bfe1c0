"""`transformers.Trainer` on a pruned model: two steps, label smoothing, evaluation with metrics, compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _families import BUILDERS
from _masked_twin import masked
from _trainers import METHODS, compare, pruned_and_masked, trainer_of

import tokenprune

pytest.importorskip("accelerate")
CELLS = [
    *(("llava", method) for method in (*METHODS, "holov@9", "flowcut@9")),
    *(("qwen2_vl", method) for method in METHODS[1:]),
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "method"), CELLS)
def test_two_steps(name: str, method: str, side: str, tmp_path: Path) -> None:
    pruned, truth, passes = pruned_and_masked(
        name, method, lambda model, folder: trainer_of(model, folder, name, side), tmp_path
    )
    compare(pruned, truth)
    assert len(passes) == 2 and all(len(kept) <= 9 for view in passes for row in view.kept for kept in row)


@pytest.mark.parametrize(("name", "method"), CELLS)
def test_gradient_checkpointing(name: str, method: str, tmp_path: Path) -> None:
    """Layers run a second time in the backward pass: what was chosen in the first holds."""
    from transformers import TrainingArguments

    flag = "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else None
    flag = flag or "gradient_checkpointing"

    def make(model: Any, folder: Path) -> Any:
        return trainer_of(model, folder, name, "left", **{flag: True})

    compare(*pruned_and_masked(name, method, make, tmp_path)[:2])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "method"), CELLS)
def test_label_smoothing(name: str, method: str, side: str, tmp_path: Path) -> None:
    """The loss is computed outside of the model, which is not given the labels; here they are of text alone."""

    def make(model: Any, folder: Path) -> Any:
        trainer = trainer_of(model, folder, name, side, label_smoothing_factor=0.1)
        for batch in trainer.train_dataset:
            first = batch["attention_mask"].int().argmax(1)
            batch["labels"][batch["labels"] < 8] = -100
            batch["labels"][torch.arange(len(first)), first] = -100
        return trainer

    compare(*pruned_and_masked(name, method, make, tmp_path)[:2])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "method"), CELLS)
def test_metrics(name: str, method: str, side: str, tmp_path: Path) -> None:
    """`compute_metrics` is handed logits and labels of one length; what it makes of them is the masked model's."""

    def metrics(prediction: Any) -> dict[str, float]:
        logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        text = labels >= 8  # what left is labelled as the caller labelled it
        text &= np.cumsum(prediction.label_ids != -100, 1)[:, :-1] > 0  # something stands before it
        chosen = np.take_along_axis(logits, np.where(text, labels, 0)[..., None], -1)[..., 0]
        return {"accuracy": (logits.argmax(-1) == labels)[text].mean(), "logit": chosen[text].mean()}

    model = BUILDERS[name]()
    trainer = trainer_of(model, tmp_path, name, side, metrics)
    # what a trainer cannot gather, unpruned no more than pruned, and positions of M-RoPE
    beside = ["cache", "past_key_values", "image_outputs", "image_hidden_states", "rope_deltas", "video_outputs"]
    with tokenprune.applied(model, method) as handle:
        with handle.watch() as passes:
            own = trainer.evaluate(ignore_keys=beside)
        policies = {stage.site: str(stage.pruner.positions) for stage in handle.stages}
    with masked(model, handle.adapter, passes, policies) as coming:
        truth = trainer.evaluate(ignore_keys=beside)
    assert len(passes) == 2 and not coming
    for key in ("eval_loss", "eval_accuracy", "eval_logit"):
        assert abs(own[key] - truth[key]) <= 1e-5 * abs(truth[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled(method: str, tmp_path: Path) -> None:
    """Trainer compiles the model, hooks and all, after the method was applied."""
    masks = {"torch_compile": True, "torch_compile_backend": "eager"}
    first = {"count": 0}

    def make(model: Any, folder: Path) -> Any:
        first["count"] += 1  # the masked model is not compiled
        return trainer_of(model, folder, "llava", "left", **(masks if first["count"] == 1 else {}))

    compare(*pruned_and_masked("llava", method, make, tmp_path)[:2])
