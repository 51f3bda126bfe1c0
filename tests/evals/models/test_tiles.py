"""Tiles are grouped as the stock processors made them: pictures of several sizes, some in one tile, ragged prompts."""

from __future__ import annotations

from typing import Any

import pytest
from _families import family
from PIL import Image

import tokenprune
from tokenprune.api import adapter_for
from tokenprune.engine.prompt_reader import prompt_visuals
from tokenprune.evals.models.processor import load_processor

SIZES = [[(96, 48), (30, 30)], [], [(50, 140)], [(30, 30), (96, 96), (48, 20), (96, 48)]]


def pictures() -> list[list[Image.Image]]:
    return [[Image.new("RGB", size, (200, 90, 9 * place)) for place, size in enumerate(row)] for row in SIZES]


def rows_of(name: str, inputs: dict[str, Any]) -> list[int]:
    """Tiles of each picture, as the prompt is read."""
    visuals = prompt_visuals(adapter_for(family(name)), "image", inputs)
    return [len(visual.rasters) for visual in visuals]


def prompts(image: str, between: str) -> list[str]:
    return [f"what {between.join([image] * len(row))} is this" if row else "who" for row in SIZES]


def pruned(name: str, inputs: dict[str, Any], wanted: list[int]) -> None:
    with tokenprune.applied(family(name), "random@7") as handle:
        family(name).generate(**inputs, max_new_tokens=2, do_sample=False)
        assert [len(own) for row in handle.kept for own in row] == [7] * len(wanted)
        assert handle.report().images == len(wanted) and not handle.report().notes


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("between", ["", " red "])
def test_internvl(crop, between, checkpoint):
    processor = load_processor(str(checkpoint("internvl")))
    flat = sum(pictures(), [])
    inputs = processor(
        images=flat, text=prompts("<IMG_CONTEXT>", between), crop_to_patches=crop, padding=True, return_tensors="pt"
    )
    made = processor.image_processor(flat, crop_to_patches=crop)["num_patches"]
    wanted = [int(tiles) for tiles in made]
    assert (max(wanted) > 2) == crop and len(wanted) == 7
    assert rows_of("internvl", dict(inputs)) == wanted
    pruned("internvl", dict(inputs), wanted)


def tiles_of(made: dict[str, Any]) -> list[int]:
    return [rows * cols + 1 for by_row in zip(made["rows"], made["cols"]) for rows, cols in zip(*by_row)]


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("between", ["", " red "])
def test_smolvlm(split, between, checkpoint):
    processor = load_processor(str(checkpoint("smolvlm")))
    inputs = processor(
        images=pictures(), text=prompts("<image>", between), do_image_splitting=split, padding=True, return_tensors="pt"
    )
    wanted = tiles_of(processor.image_processor(pictures(), do_image_splitting=split, return_row_col_info=True))
    assert (max(wanted) > 2) == split and len(wanted) == 7
    assert rows_of("smolvlm", dict(inputs)) == wanted
    pruned("smolvlm", dict(inputs), wanted)


@pytest.mark.parametrize("split", [True, False])
def test_idefics3_whose_labels_are_several_ids(split):
    """<row_1_col_1> and <global-img> are no tokens of Idefics 3: five ids and three end on the same one."""
    processor = idefics3()
    inputs = processor(
        images=pictures(), text=prompts("<image>", " "), do_image_splitting=split, padding=True, return_tensors="pt"
    )
    wanted = tiles_of(processor.image_processor(pictures(), do_image_splitting=split, return_row_col_info=True))
    assert rows_of("smolvlm", dict(inputs)) == wanted


def idefics3() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Idefics3Processor, PreTrainedTokenizerFast
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    names = ["<pad>", "</s>", "<s>", "<fake_token_around_image>", "<end_of_utterance>", "<image>", "<", ">", "-", "img"]
    names += [
        "global",
        *(f"row_{row}_col_{col}" for row in (1, 2, 3) for col in (1, 2, 3)),
        "what",
        "who",
        "is",
        "this",
    ]
    core = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="</s>",
        additional_special_tokens=["<fake_token_around_image>", "<end_of_utterance>", "<image>"],
    )  # fmt: skip
    tokenizer.padding_side = "left"
    settings = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 48}}
    return Idefics3Processor(Idefics3ImageProcessorPil(**settings), tokenizer, image_seq_len=36)
