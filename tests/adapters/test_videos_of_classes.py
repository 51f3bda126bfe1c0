"""Videos of every class that takes them and is read off its model: pruned as the masked model says, or refused with a
sentence. Batches are as the processors of the classes write them, without the processors."""

from __future__ import annotations

import contextlib
import inspect
import re
from typing import Any

import pytest
import torch
from _doubled import TOLERANCE as DOUBLE_TOLERANCE
from _doubled import double_batch, double_model, goes_along, in_double
from _eager_towers import eager_matrices, expected
from _families import BUILDERS, family, layouts
from _masked_cells import features, patches_of_tokens
from _masked_whole import compare_whole
from _zoo import BREAK, END, SPECIAL, START, VIDEO, Batch, Rows
from _zoo_all import FAMILIES, KEEP, LACKS, PLANS, zoo_model
from _zoo_videos import VIDEOS, Films, Layout, video_batch
from masked_reference import decoder_inputs, run_pruned

import tokenprune
from tokenprune.api import adapter_for
from tokenprune.engine.prompt_reader import prompt_visuals
from tokenprune.evals.models.load import LoadedModel
from tokenprune.evals.profiling.timing import ideal_prefill
from tokenprune.interfaces.signals import summary_attention
from tokenprune.state.tower_recording import sources_of

TRIED = ("divprune", "random", "layer_2", "fastv", "vtc_cls")
REFUSED = dict.fromkeys(["molmo2", "perception_lm"], "has no input cuts of a video")
"""Videos have the placeholders of pictures, or the call that makes features of pictures makes theirs."""
_MIXED = "of this video: which of its patches make a visual token follows no order"
_POOLED = "of this video: (which of its patches make|[0-9]+ visual tokens come from)"
LACKS_OF_VIDEOS = {
    ("ernie4_5_vl_moe", "vtc_cls"): f"no tower signals {_MIXED}",
    ("ernie4_5_vl_moe", "vision_0"): f"no tower cuts {_MIXED}",
    ("kimi_k25", "vtc_cls"): f"no tower signals {_POOLED}",
    ("kimi_k25", "vision_0"): f"no tower cuts {_POOLED}",
}
"""By family and plan, what pictures of the family have and its videos lack: a token is made of two frames."""
WITHOUT_GRID = ("gemma4", "gemma4_moe", "gemma4_unified", "gemma4_window")
ONE_VIDEO: Layout = (("video",),)
ONE_OF_EACH: Layout = (("video",), ("image", "video"))
TAKES = [name for name in VIDEOS if name not in REFUSED]
CELLS = [(name, plan) for name in TAKES for plan in TRIED]


def _run(model: Any, plan: str, batch: Batch, **more: Any) -> dict[str, Any]:
    method = PLANS[plan]
    return run_pruned(model, method, KEEP if isinstance(method, str) else None, batch, **more)


def _lacks(name: str, plan: str) -> str:
    """What is said of a plan that the family cannot take; "" where it can."""
    of_pictures = LACKS.get((name, plan), "").replace("of this image", "of this (image|video)")
    return LACKS_OF_VIDEOS.get((name, plan), of_pictures)


def _small(name: str) -> Layout:
    return ONE_OF_EACH if "image" in {kind for row in VIDEOS[name].layout for kind in row} else ONE_VIDEO


def _prepared(name: str, layout: Layout | None = None) -> tuple[Any, Batch, Films]:
    model, (batch, films) = zoo_model(name), video_batch(name, layout)
    return (double_model(name), double_batch(batch), films) if goes_along(name) else (model, batch, films)


def _precision(name: str) -> Any:
    return in_double() if goes_along(name) else contextlib.nullcontext()


def _silent(model: Any) -> list[int]:
    return [token for token in SPECIAL if token < model.get_output_embeddings().weight.shape[0]]


def _grids(name: str, films: Films) -> list[tuple[str, list[tuple[int, int]]]]:
    """The kind of each visual of a batch, and the grids of its frames."""
    found, frames = [], VIDEOS[name].frames
    for kind, (count, high, wide) in zip(films.kinds, films.boxes):
        if kind == "video" and frames:  # each has one grid, and there are as many
            found += [(kind, [(high, wide)])] * -(-count // frames)
        else:
            found.append((kind, [(high, wide)] * count))
    return found


@pytest.mark.parametrize(("name", "plan"), CELLS, ids=lambda value: value)
def test_removal_equals_masking_or_is_refused(name: str, plan: str) -> None:
    with _precision(name):
        model, batch, films = _prepared(name)
        if lacks := _lacks(name, plan):
            with pytest.raises(ValueError, match=lacks) as refused:
                _run(model, plan, batch, tokens=1)
            assert any(type(part).__name__ in str(refused.value) for part in model.modules()), "the class is named"
            return
        run = _run(model, plan, batch, tokens=4, silent=_silent(model))
        compare_whole(run, batch, DOUBLE_TOLERANCE if goes_along(name) else 1e-5, _silent(model))
    there = _grids(name, films)
    visuals = [span.visual for span in run["layout"].spans]
    assert [visual.kind for visual in visuals] == [kind for kind, _ in there]
    tokens = [sum(high * wide for high, wide in grids) for _, grids in there]
    assert [visual.num_tokens for visual in visuals] == tokens
    if name not in WITHOUT_GRID:
        assert [[raster.grid for raster in visual.rasters] for visual in visuals] == [grids for _, grids in there]
    kept = [len(own) for row in run["kept"] for own in row]
    assert kept == [KEEP] * len(there) and not run["kept"][-1], "each visual has its budget, the text has none"
    assert run["report"].visual_tokens == sum(tokens) and run["report"].kept_tokens == sum(kept)


@pytest.mark.parametrize("name", list(REFUSED))
def test_videos_that_cannot_be_told_are_refused(name: str) -> None:
    """Of a call that the stock model answers."""
    model, batch, _ = _prepared(name)
    with torch.no_grad():
        model(**batch)
        with tokenprune.applied(model, "random", KEEP):
            with pytest.raises(ValueError, match=f"{type(model).__name__} {REFUSED[name]}"):
                model(**batch)
            with pytest.raises(ValueError, match=f"{type(model).__name__} {REFUSED[name]}"):
                model.generate(**batch, max_new_tokens=1)


@pytest.mark.parametrize("name", TAKES)
def test_what_leaves_inside_the_tower_equals_masking_or_is_refused(name: str) -> None:
    """In double precision: a tower rounds otherwise where its patches are fewer, and decoders that choose keys or
    experts make more of that."""
    model = double_model(name)
    with in_double():
        batch, _ = video_batch(name, _small(name))
        batch = double_batch(batch)
        if lacks := _lacks(name, "vision_0"):
            with pytest.raises(ValueError, match=lacks):
                _run(model, "vision_0", batch, tokens=1)
            return
        run = _run(model, "vision_0", batch, tokens=2, silent=_silent(model))
        compare_whole(run, batch, DOUBLE_TOLERANCE, _silent(model))
    assert run["report"].kept_tokens < run["report"].visual_tokens


@pytest.mark.parametrize("name", [name for name in TAKES if not _lacks(name, "vtc_cls")])
def test_signals_of_videos_are_those_of_the_whole_matrix(name: str) -> None:
    with _precision(name):
        model, batch, _ = _prepared(name, ONE_VIDEO)
        adapter = adapter_for(model)
        facts = adapter.tower
        block = next(b for b in range(facts.feature_layer, -1, -1) if not adapter.vision.in_windows(b))
        encode = getattr(adapter.entry, adapter.features["video"])
        given = {key: value for key, value in batch.items() if key in inspect.signature(encode).parameters}
        with tokenprune.applied(model, f"vtc_cls(start_layer={block})", keep=KEEP), torch.no_grad():
            output = getattr(adapter.entry, adapter.features["video"])(**given, return_dict=True)
            recording, _ = sources_of(output)[0]
        mine = torch.cat(recording.signals[summary_attention(facts, block)])
        with eager_matrices(adapter.vision, block) as matrices:
            features(adapter, batch, "video")
        frames = [raster.num_tokens for visual in recording.visuals for raster in visual.rasters]
        patches = patches_of_tokens(adapter, adapter.vision.blocks[facts.feature_layer], batch, "video")
    assert len(patches) == sum(frames) and len(frames) > 1
    truth = expected(matrices, patches, frames, facts.has_cls)
    torch.testing.assert_close(mine, truth.to(mine.dtype), rtol=1e-4, atol=1e-7)


# --- other ways to the same videos ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma4", "kimi_k25", "minicpmv4_6", "qwen3_omni_moe_thinker", "video_llava"])
def test_beams_see_the_videos_of_their_prompt(name: str) -> None:
    with _precision(name), torch.no_grad():
        model, batch, _ = _prepared(name)
        with tokenprune.applied(model, "random", KEEP) as handle:
            model.generate(**batch, max_new_tokens=2, do_sample=False)
            alone = handle.kept
            model.generate(**batch, max_new_tokens=2, do_sample=False, num_beams=2, num_return_sequences=2)
            assert [len(row) for row in handle.kept] == [len(row) for row in alone for _ in range(2)]
            for beam, row in enumerate(handle.kept):
                assert all(map(torch.equal, row, alone[beam // 2]))


def test_frames_that_are_torn_apart_are_refused() -> None:
    """Repeated one by one, as no release of transformers does that has this class by frames."""
    model, batch, _ = _prepared("video_llava", (("video", "video"),))
    prompts = {key: value.repeat(2, 1) for key, value in batch.items() if "pixel" not in key}
    with tokenprune.applied(model, "random", KEEP) as handle, torch.no_grad():
        output = model.model.get_video_features(batch["pixel_values_videos"], vision_feature_layer=-2, return_dict=True)
        whole = output.pooler_output
        output.pooler_output = whole.repeat(2, 1, 1)
        model(**prompts, mm_encoder_outputs={"video": output})
        assert [[len(tokens) for tokens in row] for row in handle.kept] == [[KEEP] * 2] * 2
        output.pooler_output = whole.repeat_interleave(2, dim=0)
        with pytest.raises(ValueError, match="or that were cut up since"):
            model(**prompts, mm_encoder_outputs={"video": output})


@pytest.mark.parametrize("name", TAKES)
def test_videos_are_laid_out_alike_without_a_run(name: str) -> None:
    """As overlays and diagnostics ask for them."""
    model, (batch, films) = zoo_model(name), video_batch(name)
    with tokenprune.applied(model, "random", 1.0) as handle, torch.no_grad():
        model(**batch)
        spans = handle.last.layout.spans
    for kind in films.there:
        shown = prompt_visuals(adapter_for(model), kind, batch)
        assert [visual.rasters for visual in shown] == [s.visual.rasters for s in spans if s.visual.kind == kind]


@pytest.mark.parametrize("name", ["glm4v", "glm_ocr", "hyperclovax_vision_v2", "video_llava"])
def test_the_ideal_prefill_is_given_the_frames_that_stay(name: str) -> None:
    """It is timed beside the pruned one, and finds features and placeholders by itself."""
    model, (batch, _) = zoo_model(name), video_batch(name, ONE_VIDEO)
    adapter = adapter_for(model)
    with torch.no_grad():
        with tokenprune.applied(model, "random", KEEP) as handle, decoder_inputs(adapter) as pruned:
            model(**batch)
            stays = handle.stays
        run = ideal_prefill(LoadedModel(name, model, None, ""), batch, stays)
        with decoder_inputs(adapter) as ideal:
            run()
    assert torch.equal(ideal[0]["inputs_embeds"], pruned[-1]["inputs_embeds"])


@pytest.mark.parametrize("name", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_sound_stands_among_the_frames_of_its_video(name: str) -> None:
    model, rows, boxes = zoo_model(name), Rows(0, [1, 1]), [(3, 2, 3), (2, 3, 3)]
    seconds, heard = 4 / model.config.position_id_per_seconds, {"qwen2_5_omni_thinker": 10, "qwen3_omni_moe_thinker": 5}

    def part(frames: int, high: int, wide: int) -> list[int]:
        """Each frame at its time, a sound an id; four ids a frame."""
        times = [(4 * frame, VIDEO) for frame in range(frames) for _ in range(high * wide)]
        both = sorted(
            [*times, *((time, BREAK) for time in range(heard[name]))], key=lambda one: (one[0], one[1] == BREAK)
        )
        return [START, 61, *(token for _, token in both), 62, END]

    batch: dict[str, Any] = {
        **rows.write([part(*box) for box in boxes]),
        "pixel_values_videos": rows.pixels(4 * sum(t * high * wide for t, high, wide in boxes), 96),
        "video_grid_thw": torch.tensor([[t, 2 * high, 2 * wide] for t, high, wide in boxes]),
        "video_second_per_grid": torch.full((2,), seconds),
        "input_features": rows.pixels(2, 16, 40),
        "feature_attention_mask": torch.ones(2, 40, dtype=torch.int64),
        "use_audio_in_video": True,
    }
    run = run_pruned(model, "divprune", KEEP, batch, tokens=4, silent=_silent(model))
    compare_whole(run, batch, 1e-5, _silent(model))
    assert [len(tokens) for row in run["kept"] for tokens in row] == [KEEP, KEEP]
    places = [span.places for span in run["layout"].spans]
    assert all(int(own[-1] - own[0]) >= len(own) for own in places), "sounds stand between"


def test_pixels_of_videos_under_another_name_are_refused() -> None:
    """As code that comes with a checkpoint may call them; they would run unpruned, in silence."""
    model = zoo_model("llava_siglip")
    ids = torch.tensor([[10, 11, 12]])
    with tokenprune.applied(model, "random", KEEP), torch.no_grad():
        says = f"brings video_pixels, and {type(model).__name__} has no input cuts of a video"
        with pytest.raises(ValueError, match=says):
            model(input_ids=ids, video_pixels=torch.zeros(1, 2, 3, 24, 24))
        model(input_ids=ids, video_pixels=None)


# --- no class is forgotten --------------------------------------------------------------------------------------------


def _takes_videos(model: type) -> bool:
    """Whether its forward call names pixels of videos."""
    return any(re.search("pixel.*video|video.*pixel", name) for name in inspect.signature(model.forward).parameters)


def test_every_class_that_takes_videos_is_tried() -> None:
    found = set()
    for name, own in FAMILIES.items():
        with contextlib.suppress(ImportError):  # older releases of transformers do not have all
            if _takes_videos(own.make()[0]):
                found.add(name)
    missing = {name for name in VIDEOS if name not in found and _exists(name)}
    assert found <= VIDEOS.keys(), "a class takes videos, and none are written for it"
    assert not missing, "videos are written for a class that takes none"
    with_files = {name for name in BUILDERS if _takes_videos(type(family(name)))}
    assert with_files == {name for name in BUILDERS if "mixed_left" in layouts(name)}


def _exists(name: str) -> bool:
    try:
        FAMILIES[name].make()
    except ImportError:
        return False
    return True


def test_the_tables_name_families_of_the_zoo() -> None:
    assert VIDEOS.keys() <= FAMILIES.keys()
    assert {*REFUSED, *WITHOUT_GRID, *(name for name, _ in LACKS_OF_VIDEOS)} <= VIDEOS.keys()
    assert not LACKS_OF_VIDEOS.keys() & LACKS.keys(), "what pictures lack is in the table of pictures"
