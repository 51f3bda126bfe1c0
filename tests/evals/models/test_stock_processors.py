"""`FrameProcessor` against the stock video processors, which need torchvision: skipped where that does not load."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _processors import FILES
from _zoo_processors import STOCK

from tokenprune.evals.models.processor import FrameProcessor, load_processor

pytest.importorskip("torchvision", exc_type=ImportError)

WITH_VIDEO = [name for name, files in FILES.items() if files.video or name.startswith("qwen")]
OF_ZOO = ["glm4v", "glm46v", "qwen3_vl_moe", "qwen3_5", "qwen2_5_omni"]
# frames that are as large as the model sees them: no resizing, so nothing to differ in
FITTING = {
    "llava_next_video": (28, 28), "llava_onevision": (28, 28), "internvl": (48, 48), "smolvlm": (48, 48),
    # whose limits are those of all frames together
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v", "glm46v"), (24, 16)),
}  # fmt: skip


def pil_image_processor(folder) -> object:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(str(folder), backend="pil")


def clip(frames: int, size: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, size[1], size[0], 3), np.uint8)


def both(folder, clips: list[np.ndarray]) -> tuple[dict, dict]:
    stock = load_processor(str(folder))
    assert not isinstance(stock.video_processor, FrameProcessor)
    own = FrameProcessor(str(folder))
    own.image_processor = pil_image_processor(folder)
    found = own(clips, return_tensors="pt")
    wanted = stock.video_processor([torch.from_numpy(each).permute(0, 3, 1, 2) for each in clips],
                                   do_sample_frames=False, return_tensors="pt")  # fmt: skip
    keys = ("pixel_values_videos", "video_grid_thw", "pixel_values")
    return tuple({key: torch.as_tensor(np.asarray(one[key])) for key in keys if key in one} for one in (found, wanted))


@pytest.mark.parametrize("frames", [4, 5])
@pytest.mark.parametrize("name", WITH_VIDEO)
def test_frames_that_fit_are_prepared_alike(name, frames, checkpoint):
    found, wanted = both(checkpoint(name), [clip(frames, FITTING.get(name, (56, 40)), seed) for seed in (0, 1)])
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert found[key].shape == value.shape, key
        torch.testing.assert_close(found[key].double(), value.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_frames_that_do_not_fit_get_the_size_that_the_stock_class_gives_them(name, checkpoint):
    """Values differ where the two resize: their bicubic filters are not the same."""
    found, wanted = both(checkpoint(name), [clip(4, (90, 62), 0)])
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in wanted.items()}
    if "video_grid_thw" in wanted:
        assert found["video_grid_thw"].tolist() == wanted["video_grid_thw"].tolist()


@pytest.mark.parametrize("frames", [4, 5])
@pytest.mark.parametrize("name", [name for name in OF_ZOO if name != "qwen2_5_omni"])
def test_frames_that_fit_are_prepared_alike_in_classes_of_the_zoo(name, frames, stock):
    found, wanted = both(stock(name), [clip(frames, FITTING[name], seed) for seed in (0, 1)])
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key].double(), value.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(90, 62), (40, 56)])
@pytest.mark.parametrize("name", OF_ZOO)
def test_frames_get_the_size_that_the_processor_gives_them_in_classes_of_the_zoo(name, size, stock):
    """By the whole processor, which may have limits of its own beside the video processor's."""
    loaded = load_processor(str(stock(name)))
    frames = [torch.from_numpy(each).permute(2, 0, 1) for each in clip(4, size, 0)]
    asked = {"text": [STOCK[name].clip], "return_tensors": "pt", "do_sample_frames": False}
    asked["video_metadata"] = [{"fps": 2.0, "total_num_frames": 4, "duration": 2.0, "frames_indices": [0, 1, 2, 3]}]
    wanted = loaded(videos=[torch.stack(frames)], **asked)
    loaded.video_processor = FrameProcessor(str(stock(name)))
    loaded.video_processor.image_processor = pil_image_processor(stock(name))
    found = loaded(videos=[list(clip(4, size, 0))], **asked)
    assert found["video_grid_thw"].tolist() == wanted["video_grid_thw"].tolist()
    assert found["input_ids"].tolist() == wanted["input_ids"].tolist()


@pytest.mark.parametrize("name", ["ernie4_5_vl_moe", "video_llama_3", "molmo2", "kimi_k25", "perception_lm"])
def test_where_frames_are_not_prepared_one_by_one_nothing_stands_in(name, stock):
    with pytest.raises(ImportError, match="need the package torchvision"):
        FrameProcessor(str(stock(name)))([clip(4, (24, 24), 0)])
