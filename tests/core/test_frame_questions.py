"""Scores of frames: what a model's answer is read as, and that they are those of each frame alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _families import family
from _processors import save_checkpoint
from PIL import Image

import tokenprune
from tokenprune import frame_questions
from tokenprune.frame_questions import frame_scores, letter_token, parse_objects, question_objects


@pytest.mark.parametrize(
    ("answer", "objects"),
    [
        ('Step 1: yes\nStep 2: ["mug", "mood"]\nStep 3: ["mug"]', ["mug"]),
        ("STEP 1: YES.\nstep 2: ['a']\nSTEP 3: the list is ['red car', 'man ', 3, '']", ["red car", "man"]),
        ("Step 1: are physical objects needed? Yes\nStep 3: ['dog']", ["dog"]),
        ("Step 1: no\nStep 2: []\nStep 3: ['dog']", []),
        ("Step 1: no, yes would be wrong\nStep 3: ['dog']", []),
        ("Step 1: yes\nStep 2: ['dog']", []),
        ("Step 1: yes\nStep 3: [dog, cat]", []),
        ("Step 1: yes\nStep 3: [__import__('os').system('exit 3')]", []),
        ("Step 1: yes\nStep 3: ['dog'", []),
        ("Step 1: yes\nStep 3: [" + "(" * 5000 + "]", []),
        ("step 3: ['dog']", []),
        ("", []),
    ],
)
def test_objects_are_read_as_literals_and_default_to_none(answer: str, objects: list[str]) -> None:
    assert parse_objects(answer) == objects


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("hub") / "llava_next"
    save_checkpoint("llava_next", folder)
    return AutoProcessor.from_pretrained(folder)


def test_a_letter_that_is_no_token_is_refused(processor) -> None:
    assert letter_token(processor.tokenizer, "yes") == processor.tokenizer.convert_tokens_to_ids("yes")
    with pytest.raises(ValueError, match="the one token 'A'"):
        letter_token(processor.tokenizer)


@pytest.mark.parametrize("objects", [[], ["red", "blue"]])
def test_scores_are_those_of_each_frame_alone(processor, monkeypatch, objects: list[str]) -> None:
    model, letter = family("llava_next"), letter_token(processor.tokenizer, "yes")
    monkeypatch.setattr(frame_questions, "letter_token", lambda tokenizer: letter)
    draw = np.random.default_rng(0)
    sizes = [(30, 60), (40, 30), (56, 56), (20, 20), (50, 25)]  # of different lengths, so rows are padded
    frames = [Image.fromarray(draw.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
    processor.tokenizer.padding_side = "right"
    scores = tokenprune.frame_scores(model, processor, frames, "where is this", objects=objects, batch=3)
    assert processor.tokenizer.padding_side == "right", "as it was"
    text = "red, blue" if objects else "where is this"
    for frame, score in zip(frames, scores, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": "%s"}]
        written = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        written = written.removeprefix(processor.tokenizer.bos_token)  # which the tokenizer adds by itself
        form = frame_questions.OBJECT_PROMPT if objects else frame_questions.QUESTION_PROMPT
        asked = form.replace("{objects}", text).replace("{question}", text) + frame_questions.OPTIONS
        inputs = processor(text=[written.replace("%s", asked)], images=[[frame]], return_tensors="pt")
        with torch.no_grad():
            truth = model(**inputs).logits[0, -1].double().softmax(0)[letter]
        assert score == pytest.approx(float(truth), rel=1e-4)
    assert len(set(scores)) > 1


def test_the_model_is_asked_for_objects_where_none_are_given(processor, monkeypatch) -> None:
    letter = letter_token(processor.tokenizer, "yes")
    monkeypatch.setattr(frame_questions, "letter_token", lambda tokenizer: letter)
    model, frame = family("llava_next"), Image.new("RGB", (24, 24))
    assert question_objects(model, processor, "where is this", max_new_tokens=3) == [], "random words are no list"
    monkeypatch.setattr(frame_questions, "question_objects", lambda *args: ["red"])
    asked = frame_scores(model, processor, [frame], "where is this")
    assert asked == frame_scores(model, processor, [frame], "another question", objects=["red"])
