"""Asking a model which frames of a video a question is about: scores for the method `quota`.

As QuoTA does (arXiv 2503.08689): the question is boiled down to physical objects, each frame is shown by itself with a
yes/no question about them, and its score is the probability of the letter for yes:

    scores = tokenprune.frame_scores(model, processor, frames, question)
    with tokenprune.applied(model, "quota", keep=0.25) as handle:
        handle.set_hints(frame_scores=[scores])
        model.generate(**inputs)

Any model that takes pictures can be asked, also the one that answers (the paper takes Qwen2-VL-2B). It costs a pass a
frame, and one of text. Prompts are worded by us; scores therefore differ from the authors'.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

OBJECTS = """Decide which physical objects a person must find in a video to answer a question. Work in three steps.
Step 1: are physical objects needed? Write yes or no.
Step 2: list the objects, as ["...", "..."].
Step 3: repeat the list without anything abstract (actions, feelings, times, numbers).

Question: What colour is the mug that the man puts on the desk?
Step 1: yes
Step 2: ["mug", "man", "desk", "colour"]
Step 3: ["mug", "man", "desk"]

Question: What is the mood of the video?
Step 1: no
Step 2: []
Step 3: []

Question: {question}
"""
OBJECT_PROMPT = "Does the image show any of these: {objects}?"
QUESTION_PROMPT = "Does the image hold enough information to answer this question: {question}"
OPTIONS = "\nA. yes\nB. no\nAnswer with the letter of the right option."


def parse_objects(answer: str) -> list[str]:
    """The list behind "step 3" in a model's answer, where its "step 1" says yes; empty where anything is not as asked.

    The list is read as a literal and never run.
    """
    steps = {int(one[1]): one[2] for one in re.finditer(r"step\s*([123])\b(.*?)(?=step\s*[123]\b|\Z)", answer, _FLAGS)}
    if not re.match(r"\W*(?:are\b.*?\?)?\W*yes\b", steps.get(1, ""), _FLAGS):
        return []
    found = re.search(r"\[[^\[\]]*\]", steps.get(3, ""))
    if found is None:
        return []
    try:
        items = ast.literal_eval(found[0])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [item.strip() for item in items if isinstance(item, str) and item.strip()]


_FLAGS = re.IGNORECASE | re.DOTALL


@torch.no_grad()
def question_objects(model: Any, processor: Any, question: str, max_new_tokens: int = 256) -> list[str]:
    """Physical objects that a question is about, as the model says them; empty where it says none."""
    text = _prompt(processor, OBJECTS.format(question=question), pictures=0)
    inputs = processor(text=[text], return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return parse_objects(
        processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    )


def letter_token(tokenizer: Any, letter: str = "A") -> int:
    """The token that an answer of this one letter begins with.

    Raises:
        ValueError: the tokenizer makes more than one token of it, or does not know it.
    """
    tokens = tokenizer.encode(letter, add_special_tokens=False)
    if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"A frame's score is the probability of the one token {letter!r}, and this tokenizer makes {tokens} of it. "
            "Ask another model."
        )
    return tokens[0]


@torch.no_grad()
def frame_scores(
    model: Any,
    processor: Any,
    frames: Sequence[Any],
    question: str,
    objects: Sequence[str] | None = None,
    batch: int = 64,
) -> list[float]:
    """How likely the model says that each frame shows what the question is about: the hint "frame_scores" of a video.

    Args:
        model: takes pictures; nothing may be applied to it.
        processor: of the model, with a chat template.
        frames: pictures as the processor takes them (PIL, RGB), in the order of the video.
        question: of the user.
        objects: what to look for; None asks the model (`question_objects`), [] asks about the question itself.
        batch: frames at a time.

    Returns:
        For each frame the softmax over the whole vocabulary at "A" (yes), in [0, 1].

    Raises:
        ValueError: "A" is no token of its own.
    """
    letter = letter_token(processor.tokenizer)
    if objects is None:
        objects = question_objects(model, processor, question)
    asked = OBJECT_PROMPT.format(objects=", ".join(objects)) if objects else QUESTION_PROMPT.format(question=question)
    text = _prompt(processor, asked + OPTIONS, pictures=1)
    side, scores = processor.tokenizer.padding_side, []
    processor.tokenizer.padding_side = "left"  # so that the last place of every row is a token
    try:
        for start in range(0, len(frames), batch):
            part = frames[start : start + batch]
            scores += _probabilities(model, processor, text, part)[:, letter].tolist()
    finally:
        processor.tokenizer.padding_side = side
    return scores


def _probabilities(model: Any, processor: Any, text: str, frames: Sequence[Any]) -> Tensor:
    """`[B, V]` fp32, of the first token of each answer."""
    inputs = processor(
        text=[text] * len(frames), images=[[frame] for frame in frames], padding=True, return_tensors="pt"
    ).to(model.device, dtype=model.dtype)
    # of all places only the last one's logits are made, whatever the model calls the option for that
    out = model.generate(**inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return out.logits[0].float().softmax(dim=-1)


def _prompt(processor: Any, text: str, pictures: int) -> str:
    content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": text}]
    written = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token
    # some templates write the token that the tokenizer adds by itself
    doubled = bos and tokenizer(written).input_ids[:2] == [tokenizer.bos_token_id] * 2
    return written.removeprefix(bos) if doubled else written
