"""Prompts of popular classes as their stock processors and chat templates make them: pictures of several sizes, several
of them, rows of text alone, padded on the left; pruned as the masked model says, and through the command line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _masked_whole import compare_whole
from _zoo import SPECIAL
from _zoo_processors import STOCK
from masked_reference import run_pruned
from PIL import Image

import tokenprune
from tokenprune.cli import main
from tokenprune.evals.models.chat_template import one_turn, prompt_text
from tokenprune.evals.models.load import load_model

KEEP = 4
ROWS = (("what is this", [(56, 28), (30, 90)]), ("who", [(40, 40)]), ("where is it", []))
"""A question and the (width, height) of its pictures."""
GRIDLESS = ("molmo2", "aria")
NO_TEXT_ALONE = ("paligemma", "got_ocr2")
STACKED = ("perception_lm",)
"""Whose stock processor stacks tiles, so that all pictures of a call have as many: alike, or one prompt at a time."""
every_class = pytest.mark.parametrize("name", list(STOCK))


def _pictures(sizes: list[tuple[int, int]]) -> tuple[Image.Image, ...]:
    rng = np.random.default_rng(len(sizes))
    return tuple(Image.fromarray(rng.integers(0, 256, (high, wide, 3), np.uint8)) for wide, high in sizes)


@every_class
def test_what_the_processor_makes_is_pruned_picture_by_picture(name: str, stock: Callable[[str], Path]) -> None:
    loaded = load_model(str(stock(name)), device="cpu")
    loaded.model.generation_config.eos_token_id = None
    pictures = [[(40, 40)] * len(sizes) if name in STACKED else sizes for _, sizes in ROWS]
    batch = dict(loaded.inputs([text for text, _ in ROWS], [_pictures(sizes) for sizes in pictures]))
    assert int(batch["attention_mask"][0].min()) == 1 and not bool(batch["attention_mask"][1:, 0].any()), "left padding"
    silent = [token for token in SPECIAL if token < loaded.model.get_output_embeddings().weight.shape[0]]
    run = run_pruned(loaded.model, "divprune", KEEP, batch, tokens=4, silent=silent)
    assert [len(row) for row in run["kept"]] == [len(sizes) for _, sizes in ROWS], "one visual for each picture"
    assert all(len(tokens) == KEEP for row in run["kept"] for tokens in row)
    assert not run["report"].notes
    compare_whole(run, batch, 1e-5, silent)


@pytest.mark.parametrize("name", [name for name in STOCK if name not in NO_TEXT_ALONE])
def test_text_alone_is_left_as_it_is(name: str, stock: Callable[[str], Path]) -> None:
    loaded = load_model(str(stock(name)), device="cpu")
    batch = loaded.inputs(["who is this"], [()])
    assert not any(key.startswith("pixel") for key in batch)
    places = set(loaded.adapter.placeholder_ids.values())
    assert not places & set(batch["input_ids"][0].tolist())
    asked = len(loaded.processor.tokenizer("who is this").input_ids)
    assert asked <= batch["input_ids"].shape[1] <= asked + 16, "the question and the marks of a turn"


@pytest.mark.parametrize("name", NO_TEXT_ALONE)
def test_text_alone_that_the_processor_excludes_is_refused(name: str, stock: Callable[[str], Path]) -> None:
    loaded = load_model(str(stock(name)), device="cpu")
    with pytest.raises(
        ValueError, match=rf"The processor of .*{name} does not take this prompt, which has no picture: .*image"
    ):
        loaded.inputs(["who is this"], [()])


@every_class
def test_the_command_line_takes_it(
    name: str, stock: Callable[[str], Path], sized_task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = "divprune" if name in GRIDLESS else "uniform"
    command = ["eval", "--model", str(stock(name)), "--tasks", sized_task, "--method", method, "--keep", str(KEEP)]
    together = "1" if name in STACKED else "4"
    more = ["--limit", "4", "--batch-size", together, "--no-timing", "--no-references", "--output", str(tmp_path)]
    assert main([*command, *more]) == 0, capsys.readouterr().err
    with (tmp_path / "summary.csv").open() as stream:
        (row,) = [row for row in csv.DictReader(stream) if row["family"] == "overall"]
    assert row["n"] == "4" and float(row["kept_tokens"]) == KEEP
    for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines():
        flops: Any = json.loads(line)["flops"]
        assert flops["measured"]["prefill"] > 0
        assert flops["agree"] is not False, flops["difference"]


def test_the_prompt_of_got_ocr_2_is_the_one_that_its_processor_writes(stock: Callable[[str], Path]) -> None:
    """Given no text, it writes a prompt with a question of its own."""
    loaded = load_model(str(stock("got_ocr2")), device="cpu")
    pictures = _pictures([(56, 28)])
    own = loaded.processor(images=list(pictures), return_tensors="pt")
    asked = loaded.inputs([" OCR: "], [pictures])
    assert torch.equal(own["input_ids"], asked["input_ids"]) and torch.equal(own["pixel_values"], asked["pixel_values"])


def test_pictures_that_the_text_counts_otherwise_are_not_dealt_out_anew(stock: Callable[[str], Path]) -> None:
    """A list of the pictures of all prompts would fit, with one of the first prompt's in the second."""
    loaded = load_model(str(stock("got_ocr2")), device="cpu")
    with pytest.raises(ValueError, match="does not take this prompt: Nested images"):
        loaded.inputs(["what", "<imgpad> who"], [_pictures([(56, 28), (30, 90)]), _pictures([(40, 40)])])


def test_without_a_chat_template_the_mark_is_the_one_that_the_processor_looks_for(stock: Callable[[str], Path]) -> None:
    processor = load_model(str(stock("aria")), device="cpu").processor
    processor.chat_template = None
    assert prompt_text(processor, one_turn("who", _pictures([(40, 40)]))) == "USER: <|img|>\nwho ASSISTANT:"


def test_of_a_model_that_also_speaks_the_part_that_answers_in_text_is_taken(stock: Callable[[str], Path]) -> None:
    from transformers import Qwen2_5OmniForConditionalGeneration as Whole
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniConfig

    loaded = load_model(str(stock("qwen2_5_omni")), device="cpu")
    config = Qwen2_5OmniConfig.from_pretrained(stock("qwen2_5_omni"))
    assert type(loaded.model.config) is type(config.thinker_config)
    whole = Whole(config).eval()
    whole.thinker.load_state_dict(loaded.model.state_dict())  # the checkpoint's weights are all there
    with pytest.raises(TypeError, match="Its part 'thinker', a Qwen2_5OmniThinker.* apply the method to model.thinker"):
        tokenprune.apply(whole, "random", keep=KEEP)
    whole.thinker.generation_config.eos_token_id = None
    batch = loaded.inputs(["who"], [_pictures([(40, 40)])])
    with tokenprune.applied(whole.thinker, "random", keep=KEEP) as handle, torch.no_grad():
        whole.speaker_map, whole.talker = {"Chelsie": {}}, type("Silent", (), {"codec_pad_token": 0})()
        whole.generate(**batch, generation_mode="text", thinker_max_new_tokens=2)
        assert handle.report().kept_tokens == KEEP
