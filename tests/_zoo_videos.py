"""Batches with videos for the tiny models of the zoo, written as the processors of their classes write them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _zoo import BREAK, END, IMAGE, START, VIDEO, Batch, Rows
from torch import Tensor

Box = tuple[int, int, int]  # frames, rows and columns of tokens
Layout = tuple[tuple[str, ...], ...]
"""The kinds of the visuals of each row."""
Form = Callable[[Rows, int, Box], list[int]]
"""(rows, placeholder, box) -> the placeholders of a video, and what stands around them."""

BESIDE_PICTURES: Layout = (("video",), ("video", "video"), ("image", "video"), ())
ALONE: Layout = (("video",), ("video", "video"), ())
_TOKENS = {"image": IMAGE, "video": VIDEO}
_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class Films:
    """The visuals of a batch: what kind each is, and its size. Videos have two or three frames.

    Args:
        name: of the family; it decides sizes, words and pixels.
        layout: the kinds of the visuals of each row.
    """

    def __init__(self, name: str, layout: Layout) -> None:
        self.rows = Rows(zlib.crc32(f"videos of {name}".encode()), [len(row) for row in layout])
        self.kinds = [kind for row in layout for kind in row]
        grids = self.rows.grids()
        self.boxes: list[Box] = [
            (2 + place % 2 if kind == "video" else 1, *grid)
            for place, (kind, grid) in enumerate(zip(self.kinds, grids))
        ]

    def of(self, kind: str) -> list[Box]:
        return [box for own, box in zip(self.kinds, self.boxes) if own == kind]

    @property
    def there(self) -> list[str]:
        """The kinds that there are."""
        return list(dict.fromkeys(self.kinds))

    def write(self, part: Callable[[str, Box], list[int]]) -> Batch:
        return self.rows.write([part(kind, box) for kind, box in zip(self.kinds, self.boxes)])


Writes = Callable[[Films], Batch]


def _types(ids: Tensor) -> Tensor:
    return (ids == IMAGE).long() + 2 * (ids == VIDEO).long()


# --- what stands in a prompt ------------------------------------------------------------------------------------------


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


# --- batches of one form ----------------------------------------------------------------------------------------------


def packed_films(
    form: Form,
    picture: Form = _one_run,
    moments: int = 2,
    types: bool = True,
    merged: int = 1,
    more: Callable[[Batch, Films], Batch] | None = None,
) -> Writes:
    """Patches of all videos in one long row, 2 x 2 of them a token.

    Args:
        form: the placeholders of a video.
        picture: those of a picture.
        moments: frames that a patch spans.
        types: whether the model is told which tokens are pictures and which are videos.
        merged: frames of patches that a token of a video spans.
        more: further arguments.
    """

    def write(films: Films) -> Batch:
        batch = films.write(lambda kind, box: (form if kind == "video" else picture)(films.rows, _TOKENS[kind], box))
        for kind in films.there:
            boxes = [(frames * (merged if kind == "video" else 1), *grid) for frames, *grid in films.of(kind)]
            patches = 4 * sum(frames * high * wide for frames, high, wide in boxes)
            batch[_PIXELS[kind]] = films.rows.pixels(patches, 3 * moments * 4 * 4)
            batch[f"{kind}_grid_thw"] = torch.tensor([[t, 2 * high, 2 * wide] for t, high, wide in boxes])
        if types:
            batch["mm_token_type_ids"] = _types(batch["input_ids"]) * (2 if form is _glm else 1)
        return batch if more is None else {**batch, **more(batch, films)}

    return write


def _seconds(batch: Batch, films: Films) -> Batch:
    return {"video_second_per_grid": torch.full((len(films.of("video")),), 0.5)}


def _merge_sizes(batch: Batch, films: Films) -> Batch:
    return {f"{kind}_merge_sizes": torch.full((len(films.of(kind)),), 2) for kind in films.there}


def _for_experts(batch: Batch, films: Films) -> Batch:
    return {"moe_mm_token_type_ids": batch["mm_token_type_ids"]}


def _chunks(films: Films) -> Batch:
    """Videos in chunks of two frames, of which a token spans both; the last may have one (Kimi)."""
    grids: dict[str, list[list[int]]] = {kind: [] for kind in films.there}
    for kind, (frames, high, wide) in zip(films.kinds, films.boxes):
        grids[kind] += [[min(2, frames - first), 2 * high, 2 * wide] for first in range(0, frames, 2)]

    def part(kind: str, box: Box) -> list[int]:
        frames, high, wide = box
        found: list[int] = []
        for _ in range(0, frames, 2):
            found += [*films.rows.words(1), START, BREAK, *[_TOKENS[kind]] * (high * wide), END]
        return found

    batch = films.write(part)
    for kind, own in grids.items():
        batch[_PIXELS[kind]] = films.rows.pixels(sum(t * high * wide for t, high, wide in own), 3, 4, 4)
        batch[f"{kind}_grid_thw"] = torch.tensor(own)
    return batch


def _strip(films: Films, types: bool = False) -> Batch:
    """Patches of all frames in one strip, with their numbers of rows and columns: 4 x 4 a token (MiniCPM-V)."""
    batch = films.write(lambda kind, box: [START, *[_TOKENS[kind]] * (box[1] * box[2]), END] * box[0])
    for kind in films.there:
        shapes = [(4 * high, 4 * wide) for frames, high, wide in films.of(kind) for _ in range(frames)]
        batch[_PIXELS[kind]] = films.rows.pixels(1, 3, 4, 4 * sum(high * wide for high, wide in shapes))
        batch["target_sizes_videos" if kind == "video" else "target_sizes"] = torch.tensor(shapes, dtype=torch.int32)
    if types:
        batch["mm_token_type_ids"] = _types(batch["input_ids"])
    return batch


def _placed(films: Films, side: int, width: int) -> Batch:
    """Patches of each picture and frame with their rows and columns, filled up with -1: `side` x `side` a token, of
    `width` values each (Gemma 4)."""
    batch = films.write(lambda kind, box: _by_frame(films.rows, _TOKENS[kind], box))
    for kind in films.there:
        shapes = [(side * high, side * wide) for frames, high, wide in films.of(kind) for _ in range(frames)]
        most = max(high * wide for high, wide in shapes)
        pixels, places = torch.zeros(len(shapes), most, width), torch.full((len(shapes), most, 2), -1)
        for own, (high, wide) in enumerate(shapes):
            pixels[own, : high * wide] = films.rows.pixels(high * wide, width)
            across, down = torch.arange(wide).repeat(high), torch.arange(high).repeat_interleave(wide)
            places[own, : high * wide] = torch.stack([across, down], dim=-1)
        batch |= {_PIXELS[kind]: pixels, f"{kind}_position_ids": places}
    batch["num_frames_per_video"] = torch.tensor([frames for frames, _, _ in films.of("video")])
    return {**batch, "mm_token_type_ids": _types(batch["input_ids"])}


def _of_one_length(films: Films, tokens: int, square: int, inside: int = 0) -> Batch:
    """Videos of two frames each, 24 pixels wide, and pictures of that size.

    Args:
        tokens: of a frame, those of no cell among them.
        square: cells along a side of a frame.
        inside: tokens of a picture; 0: it is a tile of as many tokens as a frame.
    """
    films.boxes = [(2 if kind == "video" else 1, square, square) for kind in films.kinds]
    batch = films.write(
        lambda kind, box: [IMAGE] * (inside or tokens) if kind == "image" else [VIDEO] * (tokens * box[0])
    )
    videos, pictures = len(films.of("video")), len(films.of("image"))
    batch["pixel_values_videos"] = films.rows.pixels(videos, 2, 3, 24, 24)
    if pictures:
        batch["pixel_values"] = films.rows.pixels(pictures, *(() if inside else (1,)), 3, 24, 24)
    return batch


def _pooled(films: Films) -> Batch:
    """Patches of each frame, and which four of them make a token, at the placeholders of pictures (Molmo 2)."""
    films.boxes = [(frames, 3, 3) for frames, _, _ in films.boxes]
    batch = films.write(lambda kind, box: [IMAGE] * (9 * box[0]))
    frames = [box[0] for box in films.boxes]
    corner = (torch.arange(3)[:, None] * 12 + torch.arange(3) * 2).flatten()
    cell = corner[:, None] + torch.tensor([0, 1, 6, 7])  # [9, 4]
    return {
        **batch,
        "pixel_values_videos": films.rows.pixels(sum(frames), 36, 48),
        "video_token_pooling": torch.cat([cell + 36 * frame for frame in range(sum(frames))]),
        "video_grids": torch.tensor([[count, 3, 3] for count in frames]),
        "mm_token_type_ids": (batch["input_ids"] == IMAGE).long(),
    }


# --- families ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Videos:
    """How a family takes videos.

    Attributes:
        write: a batch.
        layout: its rows.
        frames: frames of a visual of its own; 0: a video is one.
    """

    write: Writes
    layout: Layout = BESIDE_PICTURES
    frames: int = 0


_GEMMA = Videos(functools.partial(_placed, side=2, width=48))
_QWEN3 = Videos(packed_films(_by_frame))
_GLM = Videos(packed_films(_glm), ALONE)
_MUSE = Videos(packed_films(_separated, types=False))
_OMNI = Videos(packed_films(_one_run, types=False, more=_seconds))
_QWEN2 = Videos(packed_films(_one_run, types=False))
_MINICPM = Videos(_strip, frames=1)
VIDEOS: dict[str, Videos] = {
    "cohere_compass": _QWEN3,
    "cosmos3_edge": Videos(packed_films(_by_frame, moments=1)),
    "cosmos3_omni": _QWEN3,
    "dots3_note": Videos(packed_films(_one_run, moments=1, types=False)),
    "ernie4_5_vl_moe": Videos(packed_films(_one_run, moments=1, merged=2, more=_for_experts)),
    "exaone4_5": _QWEN2,
    "gemma4": _GEMMA,
    "gemma4_moe": _GEMMA,
    "gemma4_unified": Videos(functools.partial(_placed, side=1, width=192)),
    "gemma4_window": _GEMMA,
    "glm46v": _GLM,
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm_ocr": _GLM,
    "hy_v4_vl": Videos(packed_films(_with_row_ends, _with_row_ends, moments=1)),
    "hyperclovax_vision_v2": _QWEN2,
    "kimi_k25": Videos(_chunks, frames=2),
    "lfm3_vl": Videos(packed_films(_by_frame, types=False)),
    "minicpm_ocr": _MINICPM,
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": Videos(functools.partial(_strip, types=True), frames=1),
    "molmo2": Videos(_pooled, ALONE),
    "muse_glimmer": _MUSE,
    "muse_spark": _MUSE,
    "perception_lm": Videos(functools.partial(_of_one_length, tokens=9, square=3)),
    "qwen2_5_omni_thinker": _OMNI,
    "qwen3_5": _QWEN3,
    "qwen3_5_moe": _QWEN3,
    "qwen3_omni_moe_thinker": _OMNI,
    "qwen3_vl_moe": _QWEN3,
    "video_llama_3": Videos(packed_films(_by_frame, moments=1, types=False, more=_merge_sizes)),
    "video_llava": Videos(functools.partial(_of_one_length, tokens=37, square=6, inside=36)),
}


def video_batch(name: str, layout: Layout | None = None) -> tuple[Batch, Films]:
    """Inputs of a family with videos: by default a row with one, one with two, one with a picture and a video where the
    class allows that, and one of text alone; they have several lengths and are padded on the left."""
    films = Films(name, VIDEOS[name].layout if layout is None else layout)
    return VIDEOS[name].write(films), films


__all__ = ["ALONE", "VIDEOS", "Films", "Layout", "video_batch"]
