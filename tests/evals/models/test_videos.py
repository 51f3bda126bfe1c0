"""Videos of hub checkpoints without torchvision: what stands in for their video processors, and the command line."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from _families import VIDEO
from _processors import FILES
from PIL import Image

from tokenprune.cli import main
from tokenprune.evals.models.chat_template import FPS
from tokenprune.evals.models.load import load_model
from tokenprune.evals.models.processor import FrameProcessor, load_processor
from tokenprune.evals.report.overlay import seen_views
from tokenprune.evals.results.run_folder import read_pictures

VIDEOS = [name for name, files in FILES.items() if files.processor not in ("LlavaProcessor", "LlavaNextProcessor")]
WHOLE_FRAMES = {"llava_next_video": 28, "llava_onevision": 28, "internvl": 48, "smolvlm": 48}


def colours(count: int, size: tuple[int, int]) -> list[Image.Image]:
    return [Image.new("RGB", size, (5 * number, 100, 250 - 5 * number)) for number in range(count)]


def stand_in(folder) -> FrameProcessor:
    processor = load_processor(str(folder))
    if not isinstance(processor.video_processor, FrameProcessor):
        pytest.skip("torchvision is there, and the stock class does it")
    return processor.video_processor


@pytest.mark.parametrize("name", ["llava", *VIDEOS])
def test_the_command_line_evaluates_videos_or_says_why_not(name, tmp_path, checkpoint, capsys):
    command = ["eval", "--model", str(checkpoint(name)), "--tasks", "pocket-mixed:video", "--method", "uniform"]
    done = main([*command, "--keep", "0.25", "--limit", "2", "--no-timing", "--output", str(tmp_path)])
    if name == "llava":
        assert done == 2 and "takes pictures, and one of its samples is a video of 4 frames" in capsys.readouterr().err
        return
    assert done == 0
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [record["method"] for record in records] == ["none", "random", "uniform"]
    for record in records:
        assert record["flops"]["agree"], record["flops"]["difference"]
        assert record["kv"]["measured"] == record["kv"]["analytic"] and record["overall"]["n"] == 2
    assert records[2]["kept_tokens"] < 0.3 * records[0]["kept_tokens"]
    shown = read_pictures(tmp_path)
    assert len(shown) == 2 and all((tmp_path / "pictures" / v["file"]).is_file() for one in shown for v in one["views"])


@pytest.mark.parametrize("name", list(WHOLE_FRAMES))
def test_frames_are_normalised_as_pictures(name, checkpoint):
    processor, edge = stand_in(checkpoint(name)), WHOLE_FRAMES[name]
    frames = np.random.default_rng(0).integers(0, 256, (3, edge, edge, 3), dtype=np.uint8)
    found = processor([frames, frames[::-1]], return_tensors="pt")
    pixels = found["pixel_values" if name == "smolvlm" else "pixel_values_videos"]
    mean, std = (torch.tensor(processor.settings[f"image_{which}"]) for which in ("mean", "std"))
    truth = ((torch.from_numpy(frames).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(pixels, torch.stack([truth, truth.flip(0)]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "edge"), [("qwen2_vl", 12), ("qwen3_vl", 6)])
def test_the_limits_are_for_a_frame_or_for_the_video_as_in_the_stock_class(name, edge, checkpoint):
    # of 4 frames of 64 x 64: 3072 pixels each make 48 x 48, 3072 pixels together make 24 x 24
    found = stand_in(checkpoint(name))([colours(4, (64, 64))])
    assert found["video_grid_thw"].tolist() == [[2, edge, edge]]


def test_frames_know_their_times(checkpoint):
    loaded = load_model(str(checkpoint("qwen3_vl")), device="cpu")
    clip = colours(4, (32, 32))
    inputs = loaded.inputs(["who"], [clip])
    assert (inputs["input_ids"] == VIDEO).sum() == inputs["video_grid_thw"].prod() // 4
    metadata = [{"fps": FPS, "total_num_frames": 4}]
    found = loaded.processor.video_processor([clip], video_metadata=metadata, return_metadata=True)
    text = loaded.processor.replace_video_token(found, video_idx=0)
    # frames 0 and 1 at two a second lie around 0.25 s, frames 2 and 3 around 1.25 s
    assert text.startswith("<0.2 seconds>") and "<1.2 seconds>" in text


def test_settings_saved_inside_the_processors_own_file_are_found(tmp_path, checkpoint):
    """transformers 5 saves one file for the processor and its parts."""
    folder = tmp_path / "saved"
    shutil.copytree(checkpoint("llava_onevision"), folder)
    whole = json.loads((folder / "processor_config.json").read_text())
    for part, stem in (("image_processor", "preprocessor"), ("video_processor", "video_preprocessor")):
        file = folder / f"{stem}_config.json"
        whole[part] = json.loads(file.read_text())
        file.unlink()
    (folder / "processor_config.json").write_text(json.dumps(whole))
    clip = colours(2, (40, 30))
    found, truth = (stand_in(where)([clip])["pixel_values_videos"] for where in (folder, checkpoint("llava_onevision")))
    assert np.array_equal(found[0], truth[0])


def test_a_checkpoint_that_does_not_say_how_is_refused(tmp_path, checkpoint, capsys):
    folder = tmp_path / "silent"
    shutil.copytree(checkpoint("llava_onevision"), folder)
    settings = json.loads((folder / "video_preprocessor_config.json").read_text())
    (folder / "video_preprocessor_config.json").write_text(json.dumps({**settings, "size": {"longest_edge": 28}}))
    stand_in(folder)
    command = ["eval", "--model", str(folder), "--tasks", "pocket-mixed:video", "--method", "none", "--limit", "1"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "need the package torchvision, which is not installed; pictures do not." in capsys.readouterr().err


def test_a_package_that_a_processor_misses_is_a_sentence(tmp_path, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    command = ["eval", "--model", str(checkpoint("smolvlm")), "--method", "none", "--limit", "1"]
    assert main([*command, "--output", str(tmp_path)]) == 2
    assert "pip install num2words" in capsys.readouterr().err


def test_overlays_of_a_long_video_show_the_frames_of_their_rasters(checkpoint):
    loaded = load_model(str(checkpoint("qwen2_vl")), device="cpu")
    clip = colours(40, (32, 32))
    views = seen_views(loaded, dict(loaded.inputs(["who"], [clip])), clip)
    assert 10 < len(views) < 20
    # a raster is two frames, and the first of them is drawn
    assert [view.picture.getpixel((3, 3))[0] for view in views] == [10 * number for number in range(len(views))]


def test_each_tile_of_a_prompt_is_drawn_with_its_own_tokens(checkpoint):
    from tokenprune.evals.config.points import Point
    from tokenprune.evals.report.overlay import draw_kept

    loaded = load_model(str(checkpoint("internvl")), device="cpu")
    picture = Image.new("RGB", (96, 48), (250, 250, 250))
    views = seen_views(loaded, dict(loaded.inputs(["who"], [picture])), picture)
    assert [(view.visual, view.raster.start) for view in views] == [(0, 0), (0, 36), (0, 72)]
    sheet = np.asarray(draw_kept(views, Point("m", "t", "uniform", 1), [[0, 107]]).convert("L"))
    bright = [sheet[4, 4] > 200, (sheet[:, 56:104] > 200).any(), sheet[44, 2 * 56 + 44] > 200]
    assert bright == [True, False, True]
