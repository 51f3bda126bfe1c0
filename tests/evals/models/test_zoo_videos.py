"""Videos of popular classes as their stock processors and chat templates make them, without torchvision by what stands
in for their video processors: pruned as the masked model says, or refused with a sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _doubled import TOLERANCE as DOUBLE_TOLERANCE
from _doubled import double_batch, goes_along, in_double
from _masked_whole import compare_whole
from _processors import FILES
from _zoo import SPECIAL
from _zoo_all import FAMILIES
from _zoo_processors import STOCK
from masked_reference import compare, run_pruned
from PIL import Image

import tokenprune
from tokenprune.evals.models.load import LoadedModel, load_model
from tokenprune.evals.models.processor import FrameProcessor

KEEP = 4
CLIPS = (("what is this", [(4, 56, 40)]), ("who", [(6, 40, 40), (2, 40, 56)]), ("where is it", []))
"""A question, and the frames of each video with their (width, height)."""
OF_ONE_LENGTH = (("what is this", [(4, 56, 40)]), ("who", [(4, 40, 40), (4, 40, 56)]), ("where is it", []))
ONE_EACH = (("what is this", [(4, 56, 40)]), ("who", [(4, 40, 40)]))
LAYOUTS = {
    **dict.fromkeys(["internvl", "llava_next_video", "llava_onevision", "perception_lm"], OF_ONE_LENGTH),
    "molmo2": ONE_EACH,
    "qwen2_5_omni": (("who", [(2, 56, 40)]),),  # its processor has limits of its own, which make large frames
}
"""Processors that stack videos, or take one a prompt."""
NOT_BY_FRAME = ("ernie4_5_vl_moe", "video_llama_3")
"""Without torchvision nothing stands in for these: frames of theirs are compared, or written on."""
WITH_FILES = [name for name, files in FILES.items() if files.video or name.startswith("qwen")]
REFUSED = ("molmo2", "perception_lm")
"""Videos have the placeholders of pictures, or the call that makes features of pictures makes theirs."""
READ_OFF = [name for name, one in STOCK.items() if one.clip and name not in REFUSED]
FRAMES, PAIRS = ("internvl", "smolvlm"), ("kimi_k25",)
"""Families in which a frame, or two of them, is a visual of its own and has a budget of its own."""


def _clip(frames: int, width: int, height: int, still: bool = False) -> list[Image.Image]:
    rng = np.random.default_rng(frames + width)
    made = [rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(frames)]
    return [Image.fromarray(made[0] if still else one) for one in made]


def _loaded(folder: Path) -> LoadedModel:
    loaded = load_model(str(folder), device="cpu")
    loaded.model.generation_config.eos_token_id = None
    return loaded


def _batch(name: str, loaded: LoadedModel) -> tuple[dict[str, torch.Tensor], list[int]]:
    """A batch, and how many visuals each row has."""
    rows = LAYOUTS.get(name, CLIPS)
    clips = [tuple(_clip(*size) for size in sizes) for _, sizes in rows]
    share = 1 if name in FRAMES else 2 if name in PAIRS else 0
    visuals = [sum(frames // share if share else 1 for frames, _, _ in sizes) for _, sizes in rows]
    return dict(loaded.inputs([text for text, _ in rows], clips)), visuals


def _check(run: dict[str, Any], videos: list[int]) -> None:
    assert [len(row) for row in run["kept"]] == videos, "videos, or parts of them"
    assert all(len(tokens) == KEEP for row in run["kept"] for tokens in row)
    assert run["report"].kept_tokens < run["report"].visual_tokens and not run["report"].notes


def _by_stand_in(name: str, loaded: LoadedModel) -> bool:
    """Whether a stand-in takes its videos, if not the stock class; where none can, a sentence says so."""
    if name not in NOT_BY_FRAME or not isinstance(loaded.processor.video_processor, FrameProcessor):
        return True
    with pytest.raises(ImportError, match="videos of .* need the package torchvision, which is not installed"):
        _batch(name, loaded)
    return False


@pytest.mark.parametrize("name", READ_OFF)
def test_videos_of_classes_that_are_read_off_their_models(name: str, stock: Callable[[str], Path]) -> None:
    loaded = _loaded(stock(name))
    if not _by_stand_in(name, loaded):
        return
    batch, videos = _batch(name, loaded)
    silent = [token for token in SPECIAL if token < loaded.model.get_output_embeddings().weight.shape[0]]
    along = name in FAMILIES and goes_along(name)
    with in_double() if along else contextlib.nullcontext():
        model, batch = (loaded.model.double(), double_batch(batch)) if along else (loaded.model, batch)
        run = run_pruned(model, "divprune", KEEP, batch, tokens=4, silent=silent)
        _check(run, videos)
        compare_whole(run, batch, DOUBLE_TOLERANCE if along else 1e-5, silent)


@pytest.mark.parametrize("name", WITH_FILES)
def test_videos_of_families_with_files(name: str, checkpoint: Callable[[str], Path]) -> None:
    loaded = _loaded(checkpoint(name))
    batch, videos = _batch(name, loaded)
    run = run_pruned(loaded.model, "divprune", KEEP, batch, tokens=4)
    _check(run, videos)
    compare(run, batch, 1e-5)


def test_frames_that_video_llama_3_leaves_out_are_refused(stock: Callable[[str], Path]) -> None:
    """Its processor takes out patches that are as in the frame before, unless it is told not to."""
    pytest.importorskip("torchvision", exc_type=ImportError)
    loaded = _loaded(stock("video_llama_3"))
    still = loaded.inputs(["who"], [(_clip(4, 40, 40, still=True),)])
    with tokenprune.applied(loaded.model, "random", KEEP), pytest.raises(ValueError, match="left out 24 of 36 tokens"):
        loaded.model(**still)
    loaded.processor.video_processor.use_token_compression = False
    whole = dict(loaded.inputs(["who"], [(_clip(4, 40, 40, still=True),)]))
    run = run_pruned(loaded.model, "divprune", KEEP, whole, tokens=4, silent=SPECIAL)
    _check(run, [1])
    compare_whole(run, whole, 1e-5, SPECIAL)


@pytest.mark.parametrize("name", REFUSED)
def test_videos_that_are_not_told_from_pictures_are_refused(name: str, stock: Callable[[str], Path]) -> None:
    loaded = _loaded(stock(name))
    batch, _ = _batch(name, loaded)
    says = f"{type(loaded.model).__name__} has no input cuts of a video"
    with tokenprune.applied(loaded.model, "random", KEEP), pytest.raises(ValueError, match=says):
        loaded.model(**batch)


def test_pictures_and_videos_of_glm_4v_in_one_call_are_not_told_apart(stock: Callable[[str], Path]) -> None:
    """By the model itself, with nothing applied."""
    loaded = _loaded(stock("glm4v"))
    batch = loaded.inputs(["who", "what"], [(_clip(4, 40, 40),), (_clip(1, 40, 40)[0],)])
    with pytest.raises((ValueError, RuntimeError), match="features and .* tokens do not match"), torch.no_grad():
        loaded.model(**batch)
    with tokenprune.applied(loaded.model, "random", KEEP), torch.no_grad(), pytest.raises(ValueError, match="tokens"):
        loaded.model(**batch)
