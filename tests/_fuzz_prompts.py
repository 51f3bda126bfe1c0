"""Fuzz cases of prompts: pictures side by side, placeholders in the text or too few of them, no text, no frames.

The unpruned model is asked first. Where it answers, the pruned one must answer too or refuse with a sentence of ours;
where it fails, the pruned one must not answer as if all were well.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from _tiny import IMAGE, PAD, PATCHES, tiny_llava
from _tiny_processor import tiny_processor, word_tokenizer

import tokenprune
from tokenprune.evals.models.chat_template import Clip
from tokenprune.evals.models.load import LoadedModel

METHODS = (
    "uniform@9", "vtc_cls@9", "holov@0.25", "divprune@1", "fastv@9", "random@avg20", "pyramiddrop@0.3",
    "visionzip@9", "tome@0.5",
    "flowcut@9", "todre@9+naavit", "downsample@9", "sparsevlm@9", "prumerge@9",
)  # fmt: skip


@functools.cache
def _loaded() -> LoadedModel:
    transformers.logging.set_verbosity_error()
    processor = tiny_processor(word_tokenizer())
    processor.tokenizer.padding_side = "left"
    return LoadedModel("tiny", tiny_llava(), processor, "")


class AnsweredAlone(RuntimeError):
    """The pruned model answered what the model itself does not take."""


def prompt(draw: random.Random, folder: Path) -> Callable[[], Any]:
    """A prompt as ids, or as a question and pictures."""
    method = draw.choice(METHODS)
    if draw.random() < 0.25:
        return lambda: _asked(draw, method)
    return lambda: _given(_batch(draw), method, draw.random() < 0.5)


def _row(draw: random.Random) -> tuple[list[int], int]:
    """Ids of a row and how many pictures it was given."""
    ids: list[int] = []
    pictures = draw.choice((0, 1, 1, 1, 2, 3))
    for _ in range(pictures):
        if draw.random() < 0.7:  # else side by side
            ids += [draw.randrange(8, 64) for _ in range(draw.randint(1, 4))]
        ids += [IMAGE] * (PATCHES + (draw.choice((-1, 1, -PATCHES, PATCHES)) if draw.random() < 0.08 else 0))
    if draw.random() < 0.75:  # else no text behind
        ids += [draw.randrange(8, 64) for _ in range(draw.randint(1, 5))]
    if ids and draw.random() < 0.08:
        ids[draw.randrange(len(ids))] = IMAGE
    return ids, pictures + (draw.choice((-1, 1)) if draw.random() < 0.06 else 0)


def _batch(draw: random.Random) -> dict[str, Any]:
    rows = [_row(draw) for _ in range(draw.choice((1, 1, 2, 3)))]
    length = max(len(ids) for ids, _ in rows) + draw.choice((0, 0, 0, 3))
    right = draw.random() < 0.2
    ids, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.int64)
    for number, (row, _) in enumerate(rows):
        place = slice(0, len(row)) if right else slice(length - len(row), length)
        ids[number, place] = torch.tensor(row, dtype=torch.int64)
        mask[number, place] = 1
    if draw.random() < 0.05 and length:
        mask[draw.randrange(len(rows)), draw.randrange(length)] ^= 1
    pictures = max(0, sum(count for _, count in rows))
    generator = torch.Generator().manual_seed(draw.randrange(99))
    pixels = torch.randn(pictures, 3, 42, 42, generator=generator)
    if draw.random() < 0.04:
        pixels = draw.choice((pixels[:, :, :40], pixels.double(), pixels * float("nan"), pixels[:0], pixels.zero_()))
    given = {"input_ids": ids, "attention_mask": mask}
    if pictures or draw.random() < 0.1:
        given["pixel_values"] = pixels
    if draw.random() < 0.1:
        del given["attention_mask"]
    return given


def _run(model: Any, batch: dict[str, Any], generate: bool) -> None:
    with torch.no_grad():
        if generate:
            model.generate(**batch, max_new_tokens=2, do_sample=False)
        else:
            model(**batch)


def _hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def _given(batch: dict[str, Any], method: str, generate: bool) -> None:
    model, refused = _loaded().model, None
    try:
        _run(model, batch, generate)
    except Exception as error:
        refused = error
    before = _hooks(model)
    try:
        with tokenprune.applied(model, method):
            try:
                _run(model, batch, generate)
            except Exception as error:
                from _fuzz import complaint

                if refused is not None and complaint(error) and type(error) is type(refused):
                    return  # the model's own error, as without us
                raise
    finally:
        if _hooks(model) != before:  # transformers has hooks of its own, from the first call on
            raise RuntimeError("Hooks were left on the model.")
    if refused is not None:
        raise AnsweredAlone(f"{method} answered, and the model itself says {refused!r:.200}")


def _asked(draw: random.Random, method: str) -> None:
    """A question on pictures, through the processor."""
    from PIL import Image

    words = ["what", "<image>", "<pad>", "</s>", "USER:", "w9", "", "\n", "\u0000", "{", "<video>", "é" * 50]
    text = " ".join(draw.choice(words) for _ in range(draw.randint(0, 6)))
    sides = [(draw.choice((1, 2, 42, 300)), draw.choice((1, 7, 42))) for _ in range(draw.randint(0, 3))]
    pictures: list[Any] = [Image.new(draw.choice(("RGB", "L", "P", "RGBA", "1", "F")), side) for side in sides]
    visual: Any = tuple(pictures)
    if draw.random() < 0.2:
        visual = Clip(draw.choice(([], pictures)))  # a video, of no frames maybe
    inputs = dict(_loaded().inputs([text], [visual]))
    _given(inputs, method, draw.random() < 0.5)
