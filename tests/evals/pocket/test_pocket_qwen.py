"""What the recipe of pocket-qwen takes for granted; its suite; processors without torchvision."""

from __future__ import annotations

import random

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tokenprune.evals.models.processor import FrameProcessor, load_processor
from tokenprune.evals.pocket import mixed_suite as suite
from tokenprune.evals.pocket.clips import WAYS, ask_clip, make_clip
from tokenprune.evals.pocket.scenes import PATCH, SPLIT_SEED
from tokenprune.evals.pocket_training.qwen import answer, model, see, transfer
from tokenprune.evals.pocket_training.qwen.train import STAGES
from tokenprune.evals.tasks.load import load_task, task_names


@pytest.fixture(scope="module")
def qwen():
    torch.manual_seed(0)
    return model.build_qwen().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, qwen):
    where = tmp_path_factory.mktemp("pocket-qwen")
    model.export(qwen, where, torch.float32)
    return where


@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (6, 5), (10, 9)])
@torch.no_grad()
def test_the_fast_tower_equals_the_stock_one(qwen, rows, cols):
    frames = torch.randn(2, 2, 3, rows * 14, cols * 14)
    large = frames.repeat_interleave(2, -1).repeat_interleave(2, -2)
    packed = (
        large.view(2, 2, 3, rows, 2, 14, cols, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * 2 * 14 * 14)
    )
    grid = torch.tensor([[1, 2 * rows, 2 * cols]] * 2)
    truth = qwen.model.visual(packed, grid).pooler_output
    truth = torch.cat(list(truth)) if isinstance(truth, (tuple, list)) else truth
    found = answer.run_tower(qwen.model.visual, frames).flatten(0, 1)
    assert (found - truth).norm() / truth.norm() < 1e-5


@pytest.mark.parametrize("clip", [False, True])
def test_a_packed_prompt_stands_where_the_stock_model_puts_it(qwen, clip):
    """Positions of one turn, and the ids before it, against `get_rope_index` on the text that a user sends."""
    batch = answer.Batch(STAGES["J2"], 3, "val", drop=False, clips=clip)
    cols, rows = batch.size
    count = batch.grids * rows * cols
    pad = model.VIDEO if clip else model.IMAGE
    first = (batch.labels[0] >= 0).nonzero()[:, 0]
    asked = int(first[0]) + 1
    text = "USER:" + model.START + pad * count + model.END
    ids = torch.tensor([[*model.build_tokenizer()(text).input_ids, *batch.ids[0, :asked].tolist()]])
    kind = (ids == model.build_tokenizer().convert_tokens_to_ids(pad)).long() * (2 if clip else 1)
    grid = torch.tensor([[batch.grids, 2 * rows, 2 * cols]])
    given = {"video_grid_thw": grid, "second_per_grid_ts": torch.tensor([1.0])} if clip else {"image_grid_thw": grid}
    truth, _ = qwen.model.get_rope_index(ids, mm_token_type_ids=kind, attention_mask=torch.ones_like(ids), **given)
    assert torch.equal(batch.positions[:, 0, : ids.shape[1]], truth[-3:, 0])


def test_turns_see_the_picture_and_themselves_only():
    batch = answer.Batch(STAGES["J2"], 5, "val", drop=False, clips=False)
    head = batch.mask.shape[2] - batch.ids.shape[1]
    begins = [0] + ((batch.positions[0, 0, head + 1 :] < batch.positions[0, 0, head:-1]).nonzero()[:, 0] + 1).tolist()
    assert len(begins) > 3
    for at, end in zip(begins[:3], begins[1:4]):
        row = batch.mask[0, 0, head + end - 1]
        assert row[:head].all() and row[head + at : head + end].all()
        assert not row[head : head + at].any() and not row[head + end :].any()


def test_dropped_background_keeps_what_things_touch():
    batch = answer.Batch(STAGES["J2"], 4, "val", drop=True, clips=False)
    assert batch.kept is not None and batch.kept.shape[1] < batch.size[0] * batch.size[1]
    places = batch.positions[:, 0, transfer.FIRST : transfer.FIRST + batch.kept.shape[1]] - transfer.FIRST
    assert torch.equal(places[1] * batch.size[0] + places[2], batch.kept[0])


def test_the_decoder_starts_as_pocket_llavas(qwen):
    """Words leave the new first layer nearly as they came, and empty places nearly as pocket-llava writes them."""
    torch.manual_seed(0)
    fresh, teacher = model.build_qwen(), transfer.load_teacher()
    transfer.transfer(fresh, teacher, scenes=2)
    core, old = fresh.model.language_model, teacher.model.language_model
    for mine, theirs in zip(core.layers[1:], old.layers):
        assert torch.equal(mine.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
    table = transfer.token_map()
    ids = torch.tensor(model.build_tokenizer()("what colour is the ring? ASSISTANT: red").input_ids)
    assert torch.equal(core.embed_tokens(ids), old.embed_tokens(table[ids]))
    words = core.embed_tokens(ids)[None]
    where = torch.arange(len(ids)).expand(3, 1, -1)
    with torch.no_grad():
        after = core.layers[0](words, attention_mask=None, position_embeddings=core.rotary_emb(words, where))
    assert (after - words).norm() / words.norm() < 0.1


def test_readers_targets_name_what_moves():
    clip = next(c for c in (make_clip(SPLIT_SEED["val"] + i, (112, 112), 4) for i in range(50)) if len(c.ways) == 2)
    found = see.targets([clip.frames[0]], [clip.ways])["way"][0]
    assert set(found.tolist()) == {list(WAYS).index(way) for way in clip.ways.values()} | {len(WAYS)}


def test_things_move_as_told_and_stay_whole():
    for seed in range(20):
        clip = make_clip(SPLIT_SEED["val"] + seed, (112, 140), 8)
        for index, thing in enumerate(clip.frames[0].things):
            last = clip.frames[-1].things[index]
            dx, dy = WAYS.get(clip.ways.get(index, ""), (0, 0))
            moved = (last.centre[0] - thing.centre[0], last.centre[1] - thing.centre[1])
            assert [np.sign(m) for m in moved] == [dx, dy]
            areas = {int((scene.owner == index + 1).sum()) for scene in clip.frames}
            assert len(areas) == 1
        question = ask_clip(clip, random.Random(seed))
        x0, y0, x1, y1 = question.boxes[0]
        assert 0 <= x0 < x1 <= 112 and 0 <= y0 < y1 <= 140


def test_the_committed_suite_is_what_the_generator_draws():
    rows = suite.load_rows()
    assert len({row["sample_id"] for row in rows}) == len(rows)
    clip = make_clip(SPLIT_SEED["test"] + suite._SEED, (8 * PATCH, 8 * PATCH), 4, (3, 6))
    row = next(row for row in rows if row["scene_id"] == "test-clip-0000")
    frames = suite.decode(row["image"])
    assert isinstance(frames, list) and len(frames) == 4
    for frame, scene in zip(frames, clip.frames):
        assert np.array_equal(np.array(frame), suite.grown(scene.image))


def test_its_tasks_have_pictures_and_clips():
    assert {"pocket-mixed", "pocket-mixed:video", "pocket-mixed:read"} <= set(task_names())
    task = load_task("pocket-mixed:video")
    sample = next(task.load(0, 1))
    assert isinstance(sample.image, list) and all(0 <= v <= 1 for box in sample.boxes for v in box)
    sizes = {s.image.size for s in load_task("pocket-mixed:read").load(0, 12)}
    assert len(sizes) > 5 and all(w % 28 == 0 == h % 28 for w, h in sizes)


def test_a_processor_loads_without_torchvision_and_packs_frames_as_the_tower_wants_them(folder):
    processor = load_processor(str(folder))
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (5, 56, 84, 3), dtype=np.uint8)
    ask = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "which way?"}]}], tokenize=False
    )
    found = processor(text=[ask], videos=[frames], return_tensors="pt")
    assert found["video_grid_thw"].tolist() == [[3, 4, 6]]  # five frames are three pairs
    assert int((found["input_ids"] == processor.video_token_id).sum()) == 3 * 2 * 3
    assert found["second_per_grid_ts"].item() == pytest.approx(2 / 24)  # what the stock class says without metadata
    told = processor(text=[ask], videos=[frames], video_metadata=[{"fps": 2.0, "total_num_frames": 5}])
    assert told["second_per_grid_ts"] == [1.0]
    if not isinstance(processor.video_processor, FrameProcessor):
        return  # torchvision is there, and the stock class did it
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{name}")) for name in ("mean", "std"))
    pixels = (torch.from_numpy(frames).float() / 255 - mean) / std
    pixels = torch.cat([pixels, pixels[-1:]]).permute(0, 3, 1, 2)
    packed = pixels.view(3, 2, 3, 2, 2, 14, 3, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * 2 * 14 * 14)
    torch.testing.assert_close(found["pixel_values_videos"], packed, rtol=1e-4, atol=1e-4)
    again = processor(text=[ask], videos=[[Image.fromarray(frame) for frame in frames]], return_tensors="pt")
    assert torch.equal(again["pixel_values_videos"], found["pixel_values_videos"])


def test_loading_a_processor_leaves_transformers_as_it_was(folder):
    from transformers import processing_utils

    loader = processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING["video_processor"]
    before = dict(vars(loader)), processing_utils.ProcessorMixin.check_argument_for_proper_class
    load_processor(str(folder))
    assert dict(vars(loader)) == before[0]
    assert processing_utils.ProcessorMixin.check_argument_for_proper_class is before[1]


@pytest.mark.pocket
def test_the_shipped_model_answers_about_pictures_of_several_sizes_and_clips(tmp_path):
    from tokenprune.cli import main

    command = ["eval", "--model", "pocket-qwen", "--tasks", "pocket-mixed", "--method", "oracle", "--keep", "0.111"]
    assert main([*command, "--limit", "16", "--no-timing", "--output", str(tmp_path)]) in (0, None)
    rows = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    counts = {row["sample_id"]: (row["visual_tokens"], row["kept_tokens"]) for row in rows if row["method"] == "oracle"}
    # 12 x 12 tokens, and two pairs of frames of 8 x 8
    assert counts["test-0000-count"] == (144, 16) and counts["test-clip-0000-video"] == (128, 14)
    right = {
        name: sum(row["correct"] for row in rows if row["method"] == name) for name in ("none", "oracle", "random")
    }
    assert right["none"] >= 14 and right["oracle"] >= right["random"] + 3, right


def test_the_overlay_of_a_clip_shows_a_frame_for_each_raster(folder):
    from tokenprune.evals.config.points import Point
    from tokenprune.evals.models.load import load_model
    from tokenprune.evals.report.overlay import draw_kept, seen_views

    loaded = load_model(str(folder), device="cpu")
    sample = next(load_task("pocket-mixed:video").load(0, 1))
    inputs = dict(loaded.inputs([sample.question], [sample.image]))
    views = seen_views(loaded, inputs, sample.image)
    assert [view.raster.grid for view in views] == [(8, 8)] * 2
    sheet = draw_kept(views, Point("m", "t", "uniform", 4), [[0, 1, 64, 127]])
    assert sheet.width > 2 * 8 * 14 and sheet.height == 8 * 14
