"""Batches with videos for the tiny models of the zoo, written as the processors of their classes write them.

A batch has a row with one video, one with two, one with a picture and a video where the class allows that, and one of
text alone; they have several lengths and are padded on the left.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _zoo import BREAK, END, IMAGE, START, VIDEO, Batch, Rows
from torch import Tensor

Box = tuple[int, int, int]  # frames, rows and columns of tokens

_ROWS = (("video",), ("video", "video"), ("image", "video"), ())
_WITHOUT_PICTURES = (("video",), ("video", "video"), ())


class Films:
    """The visuals of a batch: what kind each is, and its size.

    Args:
        name: of the family; it decides sizes, words and pixels.
        rows: the kinds of the visuals of each row.
        most: frames of the longest video.
    """

    def __init__(self, name: str, rows: tuple[tuple[str, ...], ...] = _ROWS, most: int = 3) -> None:
        self.rows = Rows(zlib.crc32(f"videos of {name}".encode()), [len(row) for row in rows])
        self.kinds = [kind for row in rows for kind in row]
        grids = self.rows.grids()
        lengths = [2 + (place + 1) % (most - 1) if most > 2 else most for place in range(len(grids))]
        self.boxes: list[Box] = [
            (frames if kind == "video" else 1, *grid) for kind, frames, grid in zip(self.kinds, lengths, grids)
        ]

    def of(self, kind: str) -> list[Box]:
        return [box for own, box in zip(self.kinds, self.boxes) if own == kind]

    def write(self, part: Callable[[str, Box], list[int]]) -> Batch:
        return self.rows.write([part(kind, box) for kind, box in zip(self.kinds, self.boxes)])

    def types(self, ids: Tensor) -> Tensor:
        return (ids == IMAGE).long() + 2 * (ids == VIDEO).long()


Writes = Callable[[str], tuple[Batch, Films]]
_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def _one_run(rows: Rows, token: int, box: Box) -> list[int]:
    frames, high, wide = box
    return [START, *[token] * (frames * high * wide), END]


def _by_frame(rows: Rows, token: int, box: Box) -> list[int]:
    """Each frame by itself, with its time before it."""
    frames, high, wide = box
    found: list[int] = []
    for _ in range(frames):
        found += [*rows.words(2), START, *[token] * (high * wide), END]
    return found


def _glm(rows: Rows, token: int, box: Box) -> list[int]:
    """Frames at the placeholders of pictures, between the ends of the video."""
    frames, high, wide = box
    found = [BREAK]
    for _ in range(frames):
        found += [START, *[IMAGE] * (high * wide), END, *rows.words(1)]
    return [*found, 2]


def _separated(rows: Rows, token: int, box: Box) -> list[int]:
    frames, high, wide = box
    found = [START]
    for frame in range(frames):
        found += [*rows.words(1), *[token] * (high * wide), BREAK if frame < frames - 1 else END]
    return found


def _with_row_ends(rows: Rows, token: int, box: Box) -> list[int]:
    frames, high, wide = box
    return [START, *[token] * (frames * high * (wide + 1)), END]


def packed_films(
    form: Callable[[Rows, int, Box], list[int]],
    moments: int = 2,
    types: bool = True,
    unfolded: bool = False,
    merged: int = 1,
    pictures: bool = True,
    more: Callable[[Batch, Films], Batch] | None = None,
) -> Writes:
    """Patches of all videos in one long row, 2 x 2 of them a token.

    Args:
        form: the placeholders of a video, and what stands around them.
        moments: frames that a patch spans.
        types: whether the model is told which tokens are pictures and which are videos.
        unfolded: patches come as `[3, 4, 4]`, not flat.
        merged: frames of the patches that one of the tokens spans.
        pictures: whether a row has a picture beside its video.
        more: further arguments.
    """

    def write(name: str) -> tuple[Batch, Films]:
        films = Films(name, _ROWS if pictures else _WITHOUT_PICTURES)
        shape = {"image": _one_run if form is not _with_row_ends else form, "video": form}
        tokens = {"image": IMAGE, "video": VIDEO}
        batch = films.write(lambda kind, box: shape[kind](films.rows, tokens[kind], box))
        for kind in dict.fromkeys(films.kinds):
            boxes = [(frames * (merged if kind == "video" else 1), *grid) for frames, *grid in films.of(kind)]
            pixels = films.rows.pixels(4 * sum(t * high * wide for t, high, wide in boxes), 3 * moments * 4 * 4)
            batch[_PIXELS[kind]] = pixels.view(-1, 3, 4, 4) if unfolded else pixels
            batch[f"{kind}_grid_thw"] = torch.tensor([[t, 2 * high, 2 * wide] for t, high, wide in boxes])
        if types:
            batch["mm_token_type_ids"] = films.types(batch["input_ids"])
            if form is _glm:
                batch["mm_token_type_ids"] *= 2
        return (batch if more is None else {**batch, **more(batch, films)}), films

    return write


def _strip(name: str, types: bool = False) -> tuple[Batch, Films]:
    """Patches of all frames in one strip, with their numbers of rows and columns (MiniCPM-V): 4 x 4 a token."""
    films = Films(name)
    tokens = {"image": IMAGE, "video": VIDEO}
    batch = films.write(
        lambda kind, box: [START, *[tokens[kind]] * (box[1] * box[2]), END] * box[0],
    )
    for kind, sizes in (("image", "target_sizes"), ("video", "target_sizes_videos")):
        shapes = [(4 * high, 4 * wide) for frames, high, wide in films.of(kind) for _ in range(frames)]
        batch[_PIXELS[kind]] = films.rows.pixels(1, 3, 4, 4 * sum(high * wide for high, wide in shapes))
        batch[sizes] = torch.tensor(shapes, dtype=torch.int32)
    if types:
        batch["mm_token_type_ids"] = films.types(batch["input_ids"])
    return batch, films


def _placed(name: str, side: int, width: int) -> tuple[Batch, Films]:
    """Patches of each picture and frame with their rows and columns, filled up with -1 (Gemma 4): `side` x `side` a
    token, of `width` values each."""
    films = Films(name)
    tokens = {"image": IMAGE, "video": VIDEO}

    def part(kind: str, box: Box) -> list[int]:
        frames, high, wide = box
        found: list[int] = []
        for _ in range(frames):
            found += [*films.rows.words(1), START, *[tokens[kind]] * (high * wide), END]
        return found

    batch = films.write(part)
    for kind, places_of in (("image", "image_position_ids"), ("video", "video_position_ids")):
        shapes = [(side * high, side * wide) for frames, high, wide in films.of(kind) for _ in range(frames)]
        most = max(high * wide for high, wide in shapes)
        pixels, places = torch.zeros(len(shapes), most, width), torch.full((len(shapes), most, 2), -1)
        for own, (high, wide) in enumerate(shapes):
            pixels[own, : high * wide] = films.rows.pixels(high * wide, width)
            across, down = torch.arange(wide).repeat(high), torch.arange(high).repeat_interleave(wide)
            places[own, : high * wide] = torch.stack([across, down], dim=-1)
        batch |= {_PIXELS[kind]: pixels, places_of: places}
    batch["num_frames_per_video"] = torch.tensor([frames for frames, _, _ in films.of("video")])
    return {**batch, "mm_token_type_ids": films.types(batch["input_ids"])}, films


def _video_llava(name: str) -> tuple[Batch, Films]:
    """Frames of one size, 36 tokens and a [CLS] each; all videos have as many."""
    films = Films(name, most=2)
    films.boxes = [(frames, 6, 6) for frames, _, _ in films.boxes]
    batch = films.write(lambda kind, box: [IMAGE] * 36 if kind == "image" else [VIDEO] * (37 * box[0]))
    batch["pixel_values"] = films.rows.pixels(len(films.of("image")), 3, 24, 24)
    batch["pixel_values_videos"] = films.rows.pixels(len(films.of("video")), 2, 3, 24, 24)
    return batch, films


def _merge_sizes(batch: Batch, films: Films) -> Batch:
    return {f"{kind}_merge_sizes": torch.full((len(films.of(kind)),), 2) for kind in ("image", "video")}


def _seconds(batch: Batch, films: Films) -> Batch:
    return {"video_second_per_grid": torch.full((len(films.of("video")),), 0.5)}


def _typed_experts(batch: Batch, films: Films) -> Batch:
    return {"moe_mm_token_type_ids": batch["mm_token_type_ids"]}


@dataclass(frozen=True)
class VideosOf:
    """What a class makes of videos.

    Attributes:
        write: a batch.
        frames: which part of a video is a visual of its own: "" for none, "frame" for each.
    """

    write: Writes
    frames: str = ""


VIDEOS: dict[str, VideosOf] = {
    "video_llava": VideosOf(_video_llava),
    **dict.fromkeys(
        ["gemma4", "gemma4_window", "gemma4_moe"], VideosOf(functools.partial(_placed, side=2, width=48))
    ),
    "gemma4_unified": VideosOf(functools.partial(_placed, side=1, width=192)),
    **dict.fromkeys(["minicpmv4_6", "minicpm_ocr"], VideosOf(_strip, "frame")),
    "minicpmv4_7": VideosOf(functools.partial(_strip, types=True), "frame"),
    **dict.fromkeys(
        ["cohere_compass", "cosmos3_omni", "qwen3_5", "qwen3_5_moe", "qwen3_vl_moe"], VideosOf(packed_films(_by_frame))
    ),
    "cosmos3_edge": VideosOf(packed_films(_by_frame, moments=1)),
    "lfm3_vl": VideosOf(packed_films(_by_frame, types=False)),
    **dict.fromkeys(["muse_glimmer", "muse_spark"], VideosOf(packed_films(_separated, types=False))),
    "dots3_note": VideosOf(packed_films(_one_run, moments=1, types=False)),
    **dict.fromkeys(["exaone4_5", "hyperclovax_vision_v2"], VideosOf(packed_films(_one_run, types=False))),
    **dict.fromkeys(
        ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"],
        VideosOf(packed_films(_one_run, types=False, more=_seconds)),
    ),
    "hy_v4_vl": VideosOf(packed_films(_with_row_ends, moments=1)),
    **dict.fromkeys(["glm4v", "glm46v", "glm4v_moe", "glm_ocr"], VideosOf(packed_films(_glm, pictures=False))),
    "ernie4_5_vl_moe": VideosOf(packed_films(_one_run, moments=1, merged=2, more=_typed_experts)),
    "video_llama_3": VideosOf(packed_films(_by_frame, moments=1, types=False, more=_merge_sizes)),
}


def video_batch(name: str) -> tuple[Batch, Films]:
    return VIDEOS[name].write(name)


__all__ = ["VIDEOS", "Films", "video_batch"]
