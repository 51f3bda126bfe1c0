"""Bad input fails before anything runs, with a sentence that says what and what to do."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from _tiny import prompts, tiny_llava

import tokenprune
from tokenprune.registry import METHODS


@functools.cache
def model():
    return tiny_llava()


def test_unsupported_model_class_lists_what_is_supported():
    with pytest.raises(TypeError, match=r"No adapter covers a Linear.*LlavaForConditionalGeneration.*adding_a_family"):
        tokenprune.apply(torch.nn.Linear(2, 2), "uniform", keep=9)


def test_image_tokens_that_match_no_image():
    batch = prompts([1])
    batch["input_ids"][0, -1] = 5
    with tokenprune.applied(model(), "uniform@9"), pytest.raises(ValueError, match="37 image tokens.*make 36"):
        model()(**batch)
    split = prompts([1])
    places = (split["input_ids"][0] == 5).nonzero()[:, 0]
    split["input_ids"][0, places[10]] = 9
    split["input_ids"][0, -1] = 5
    with tokenprune.applied(model(), "uniform@9"), pytest.raises(ValueError, match="in a row"):
        model()(**split)


@pytest.mark.parametrize("name", ["vtc_cls", "todre", "divprune", "holov"])
def test_nan_in_the_picture_is_an_error_not_a_choice(name):
    batch = prompts([1])
    batch["pixel_values"][0, 0, 0, 0] = math.nan
    with tokenprune.applied(model(), name, keep=9), pytest.raises(ValueError, match="NaN"), torch.no_grad():
        model()(**batch)


@pytest.mark.parametrize("name", METHODS.names())
def test_a_prompt_without_images_runs_as_ever(name):
    batch = prompts([0, 0])
    with torch.no_grad():
        before = model().generate(**batch, max_new_tokens=5, do_sample=False)
        with tokenprune.applied(model(), name, keep=9) as handle:
            assert torch.equal(model().generate(**batch, max_new_tokens=5, do_sample=False), before)
            assert handle.kept == [[], []]


def test_hints():
    with tokenprune.applied(model(), "oracle@9") as handle:
        with pytest.raises(ValueError, match="set_hints"), torch.no_grad():
            model()(**prompts([1]))
        handle.set_hints(boxes=[[[0, 0, 0.1, 0.1]]])
        with pytest.raises(ValueError, match="1 value"), torch.no_grad():
            model()(**prompts([2]))
        with pytest.raises(ValueError, match="uses no hint 'boxs'"):
            handle.set_hints(boxs=[])


def test_static_cache_and_4d_masks_are_refused():
    batch = prompts([1])
    with tokenprune.applied(model(), "uniform@9"), torch.no_grad():
        with pytest.raises(ValueError, match="static cache"):
            model().generate(**batch, max_new_tokens=2, cache_implementation="static")
        length = batch["input_ids"].shape[1]
        with pytest.raises(ValueError, match="2-D attention mask"):
            model()(**{**batch, "attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool)})
        with pytest.raises(ValueError, match="covers"):
            model()(**{**batch, "attention_mask": torch.ones(1, length + 3, dtype=torch.int64)})


def test_features_computed_before_apply_are_refused():
    batch = prompts([1])
    with torch.no_grad():
        features = model().get_image_features(batch.pop("pixel_values"), return_dict=True)
        with tokenprune.applied(model(), "uniform@9"), pytest.raises(ValueError, match="before tokenprune was applied"):
            model()(**batch, mm_encoder_outputs={"image": features})


def test_features_computed_under_another_method_that_read_less_are_refused():
    batch = prompts([1])
    with torch.no_grad():
        with tokenprune.applied(model(), "uniform@9"):
            features = model().get_image_features(batch.pop("pixel_values"), return_dict=True)
        says = "cls_attention of layer .* was not read when the vision tower ran.*give pixels"
        with tokenprune.applied(model(), "vtc_cls@9"), pytest.raises(ValueError, match=says):
            model()(**batch, mm_encoder_outputs={"image": features})
