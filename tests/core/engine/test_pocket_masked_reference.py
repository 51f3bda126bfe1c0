"""The masked model on the trained pocket-llava: 576 visual tokens, real pictures and questions."""

from __future__ import annotations

import functools

import pytest
import torch
from masked_reference import compare, run_pruned

from tokenprune.registry import METHODS

pytestmark = pytest.mark.pocket


@functools.cache
def pocket():
    from tokenprune.evals.models.load import load_model

    return load_model("pocket-llava")


def batch(side: str):
    """A question on a picture and one without, padded on `side`."""
    from tokenprune.evals.pocket.suite import load

    rows, processor = load("test").select(range(3)), pocket().processor
    pictures, questions = rows["image"], rows["question"]
    processor.tokenizer.padding_side = side
    texts = [f"USER: <image>\n{questions[0]} ASSISTANT:", f"USER: {questions[1]} ASSISTANT:"]
    inputs = processor(text=texts, images=[pictures[0]], padding=True, return_tensors="pt")
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def alone():
    inputs = batch("left")
    real = inputs["attention_mask"][0].bool()
    return {"input_ids": inputs["input_ids"][:1, real], "attention_mask": inputs["attention_mask"][:1, real],
            "pixel_values": inputs["pixel_values"]}  # fmt: skip


@pytest.mark.parametrize("layout", ["one", "left", "right"])
@pytest.mark.parametrize("name", METHODS.names())
def test_removal_equals_masking_on_the_trained_model(name, layout):
    inputs = alone() if layout == "one" else batch(layout)
    run = run_pruned(pocket().model, name, 64, inputs)
    assert [len(images) for images in run["kept"]] == ([1] if layout == "one" else [1, 0])
    compare(run, inputs, 1e-5)


@pytest.mark.parametrize("name", METHODS.names())
def test_keeping_everything_changes_no_bit_of_the_trained_model(name):
    import tokenprune

    if name == "pixelprune":
        pytest.skip("its budget is a cap: what a neighbour predicts leaves also below it")
    with torch.no_grad():
        before = pocket().model(**alone()).logits
        with tokenprune.applied(pocket().model, name, keep=576):
            assert torch.equal(pocket().model(**alone()).logits, before)
