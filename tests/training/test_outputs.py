"""Outputs that a caller reads by place, and losses computed outside of the model: as the masked model gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _families import IMAGE, batch_of, family
from _masked_twin import masked
from _tiny import PAD
from torch import Tensor

import tokenprune

CELLS = [
    *(("llava", method) for method in ("vtc_cls@9", "uniform@9", "fastv@9", "pyramiddrop@9")),
    *(("qwen2_vl", method) for method in ("uniform@9", "fastv@9")),
]
Batch = dict[str, Tensor]


def padded_on_both_sides(name: str) -> tuple[Batch, Tensor]:
    """Prompts padded on the left with answers padded on the right, as trainers make them, and where answers are."""
    batch = batch_of(name, "ragged_left")
    lengths = torch.tensor([5, 2, 4, 1])
    place = torch.arange(5)[None]
    answered = (place < lengths[:, None]).long()
    answers = torch.randint(8, 64, (4, 5), generator=torch.Generator().manual_seed(7))
    answers = answers.masked_fill(answered == 0, PAD)
    at = torch.cat([torch.zeros_like(batch["attention_mask"]), answered], dim=1).bool()
    batch |= {
        "input_ids": torch.cat([batch["input_ids"], answers], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], answered], dim=1),
    }
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], torch.zeros_like(answers)], dim=1)
    return batch, at


def pictures_first(batch: Batch, left: bool) -> Batch:
    """The same rows without the words before their first picture."""
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    rows = [row[row.index(IMAGE) :] if IMAGE in row else row for row in rows]
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        pad, ones = [PAD] * (longest - len(row)), [1] * len(row)
        ids.append(pad + row if left else row + pad)
        mask.append([0] * len(pad) + ones if left else ones + [0] * len(pad))
    return {**batch, "input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def pair(name: str, method: str, ask: Callable[[Any], Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """What `ask(model)` gives on the pruned model and on the masked one."""
    model = family(name)
    with tokenprune.applied(model, method, **options) as handle:
        with handle.watch() as passes:
            own = ask(model)
        policies = {stage.site: str(stage.pruner.positions) for stage in handle.stages}
        adapter = handle.adapter
    with masked(model, adapter, passes, policies) as coming:
        truth = ask(model)
    assert passes and not coming
    return own, truth


def close(own: Tensor, truth: Tensor) -> None:
    assert own.shape == truth.shape
    assert float((own.double() - truth.double()).norm() / truth.double().norm()) < 1e-5


def log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "method"), CELLS)
def test_log_probs_of_answers(name: str, method: str, training: bool) -> None:
    """As DPO sums them, from all logits."""
    batch, at = padded_on_both_sides(name)

    def ask(model: Any) -> Tensor:
        model.train(training)
        try:
            logits = model(**batch).logits
        finally:
            model.eval()
        return (log_probs(logits[:, :-1], batch["input_ids"][:, 1:]) * at[:, 1:]).sum(1)

    close(*pair(name, method, ask))


@pytest.mark.parametrize("more", [1, 3, 9, 500])
@pytest.mark.parametrize(("name", "method"), CELLS)
def test_integer_logits_to_keep(name: str, method: str, more: int) -> None:
    """The last columns, fewer and more of them than the answers have; 500 is more than there are."""
    batch, at = padded_on_both_sides(name)

    def ask(model: Any) -> Tensor:
        logits = model(**batch, logits_to_keep=more).logits
        assert logits.shape[1] == min(more, at.shape[1])
        if more == 1:
            return logits[at[:, -1]]
        last = logits.shape[1] - 1
        return log_probs(logits[:, :-1], batch["input_ids"][:, -last:])[at[:, -last:]]

    close(*pair(name, method, ask))


@pytest.mark.parametrize(("name", "method"), CELLS)
def test_chosen_logits_to_keep(name: str, method: str) -> None:
    batch, at = padded_on_both_sides(name)
    columns = torch.arange(at.shape[1] - 6, at.shape[1] - 1)

    def ask(model: Any) -> Tensor:
        logits = model(**batch, logits_to_keep=columns).logits
        return log_probs(logits, batch["input_ids"][:, -5:])[at[:, -5:]]

    close(*pair(name, method, ask))


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """States of the last token of rows that are padded on the right."""
    return states[torch.arange(len(mask)), mask.sum(1) - 1]


@pytest.mark.parametrize("way", ["hidden_states", "last_hidden_state", "decoder_hidden_states"])
@pytest.mark.parametrize(("name", "method"), CELLS)
def test_last_token_pooling(name: str, method: str, way: str) -> None:
    batch = batch_of(name, "ragged_right")

    def ask(model: Any) -> Tensor:
        if way == "hidden_states":
            states = model(**batch, output_hidden_states=True).hidden_states[-1]
        elif way == "last_hidden_state":
            states = model.model(**batch).last_hidden_state
        else:
            states = model.model(**batch, output_hidden_states=True).hidden_states[-1]
        return pooled(states, batch["attention_mask"])

    close(*pair(name, method, ask))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "method"), CELLS)
def test_label_smoothing(name: str, method: str, side: str) -> None:
    """The way of `Trainer`: logits without labels, then the mean over all labelled tokens."""
    batch = batch_of(name, f"ragged_{side}")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels < 8, -100)  # no pictures
    first = batch["attention_mask"].int().argmax(1)
    labels[torch.arange(len(labels)), first] = -100

    def ask(model: Any) -> Tensor:
        from transformers.trainer_pt_utils import LabelSmoother

        model.train()
        try:
            return LabelSmoother(0.1)(model(**batch), labels, shift_labels=True)
        finally:
            model.eval()

    close(*pair(name, method, ask))


LAYOUTS = [
    (name, method, layout)
    for name, method in CELLS
    for layout in ("left", "right", "both", "first_left", "first_right")
    if name == "llava" or not layout.startswith("first")  # a picture of Qwen2-VL begins with a token that stays
]


@pytest.mark.parametrize(("name", "method", "layout"), LAYOUTS)
def test_loss_of_the_model(name: str, method: str, layout: str) -> None:
    """Every token is labelled, those that leave too; a row may begin with a picture, whose tokens may all leave."""
    if layout == "both":
        batch, _ = padded_on_both_sides(name)
    elif layout in ("left", "right"):
        batch = batch_of(name, f"ragged_{layout}")
    else:
        batch = pictures_first(batch_of(name, "ragged_left"), layout == "first_left")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    given = labels.clone()
    close(*pair(name, method, lambda model: model(**batch, labels=labels).loss[None]))
    assert torch.equal(labels, given), "the caller's labels were changed"


@pytest.mark.parametrize(("name", "method"), CELLS)
def test_logits_line_up_with_labels(name: str, method: str) -> None:
    """As `compute_metrics` is handed them: at every place that something stands before."""
    batch, _ = padded_on_both_sides(name)
    real = batch["attention_mask"].bool()
    close(*pair(name, method, lambda model: model(**batch, labels=batch["input_ids"]).logits[real].argmax(-1)))
    close(*pair(name, method, lambda model: model(**batch, labels=batch["input_ids"]).logits[real]))


@pytest.mark.parametrize(("name", "method"), CELLS)
def test_full_outputs_on_demand(name: str, method: str) -> None:
    """Rows padded on the left, in a mode in which the short ones would do."""
    batch = batch_of(name, "ragged_left")
    real = batch["attention_mask"].bool()
    close(*pair(name, method, lambda model: model(**batch).logits[real], outputs="full"))
