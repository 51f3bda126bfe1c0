"""The mixed pocket suite: pictures of several sizes and short videos, for models with a dynamic resolution.

``python -m tokenprune.evals.pocket.mixed_suite`` draws the committed test split anew (it needs the package easy-vqa).
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tokenprune.evals.io.picture_reader import read_frames
from tokenprune.evals.pocket.catalog import suite_file
from tokenprune.evals.pocket.clips import SCALE, ask_clip, make_clip
from tokenprune.evals.pocket.easy_vqa import easy_split
from tokenprune.evals.pocket.questions import FAMILIES, Question, ask
from tokenprune.evals.pocket.scenes import PATCH, SPLIT_SEED, make_scene
from tokenprune.evals.pocket.suite import png

TEST_FILE = Path(__file__).parent / "data" / "test_mixed.parquet"
# columns and rows of 28-pixel tokens; 140 to 400 of them
SIZES = ((12, 12), (14, 14), (10, 14), (14, 10), (18, 12), (12, 18), (16, 16), (20, 14), (14, 20), (20, 20), (24, 16))
CLIP_SIZES = ((8, 8), (10, 8), (8, 10), (10, 10))
CLIP_FRAMES = (4, 8)
TEST_SCENES, TEST_CLIPS, TEST_EASY = 200, 200, 100
COLUMNS = ("sample_id", "scene_id", "family", "image", "question", "answer", "boxes")
_SEED = 500_000_000  # within the split's range: scenes that no other suite and no training draws


def decode(image: bytes) -> Image.Image | list[Image.Image]:
    """A picture, or the frames of a clip (an animated PNG)."""
    frames = read_frames(image)
    return frames if len(frames) > 1 else frames[0]


def load_rows() -> list[dict]:
    """The test split; ``image`` as bytes for `decode`, ``boxes`` in fractions of the picture's width and height."""
    return pq.read_table(TEST_FILE).to_pylist()


def load_validation(scenes: int, clips: int) -> list[dict]:
    """So many scenes, with one question of every family each, and clips of the validation split; rows as those of
    `load_rows`. Drawn on the fly, from seeds that neither the test split nor any training uses."""
    return _scene_rows("val", scenes, clips, 0)


def training_rows(scenes: int, clips: int, start: int) -> list[dict]:
    """As `load_validation`, of the training split, from the scene and the clip number `start` on."""
    return _scene_rows("train", scenes, clips, 0, start)


def build(path: Path = TEST_FILE) -> None:
    """Draw the test split and write it; rows go round the families, and equal pictures are stored once."""
    write_rows(_scene_rows("test", TEST_SCENES, TEST_CLIPS, TEST_EASY), path)


def write_rows(rows: list[dict], path: Path, names: Sequence[str] = COLUMNS) -> None:
    """Write these columns of rows; equal pictures are stored once."""
    columns = {name: [row[name] for row in rows] for name in names}
    table = pa.table({**columns, "boxes": pa.array(columns["boxes"], pa.list_(pa.list_(pa.float32())))})
    pq.write_table(
        table, path, use_dictionary=True, dictionary_pagesize_limit=1 << 27, row_group_size=len(rows),
        compression="zstd",
    )  # fmt: skip


def _scene_rows(split: str, scenes: int, clips: int, easy: int, start: int = 0) -> list[dict]:
    rows: list[dict] = []
    # only the test split has questions of easy-VQA, and only drawing them needs its package
    extra = easy_split("test") if easy else None
    places = random.Random(1).sample(range(len(extra.images)), easy) if extra else []
    for i in range(start, start + max(scenes, clips)):
        seed = SPLIT_SEED[split] + _SEED + i
        rng = random.Random(seed)
        if i - start < scenes:
            cols, lines = SIZES[i % len(SIZES)]
            scene = make_scene(seed, (cols * PATCH, lines * PATCH), (5, 9))
            picture = png(grown(scene.image))
            for family in FAMILIES:
                question = ask(scene, family, rng)
                if question is not None:
                    rows.append(row_of(f"{split}-{i:04d}", picture, question, scene.width, scene.height))
        if i - start < clips:
            cols, lines = CLIP_SIZES[i % len(CLIP_SIZES)]
            clip = make_clip(seed, (cols * PATCH, lines * PATCH), CLIP_FRAMES[i // len(CLIP_SIZES) % 2], (3, 6))
            frames = [grown(scene.image) for scene in clip.frames]
            first = clip.frames[0]
            rows.append(
                row_of(f"{split}-clip-{i:04d}", animation(frames), ask_clip(clip, rng), first.width, first.height)
            )
        if extra and i < easy:
            side = rng.choice((10, 12, 14, 16)) * PATCH
            question, answer = rng.choice(extra.questions[places[i]])
            asked = Question("easy_vqa", question, answer, ((0.0, 0.0, float(side), float(side)),))
            rows.append(row_of(f"easy-{i:04d}", png(grown(extra.image(places[i], side))), asked, side, side))
    return rows


def row_of(scene_id: str, image: bytes, question: Question, width: int, height: int) -> dict:
    """A row of a question about a scene of so many pixels; its boxes become fractions of them."""
    boxes = [[x0 / width, y0 / height, x1 / width, y1 / height] for x0, y0, x1, y1 in question.boxes]
    return {
        "sample_id": f"{scene_id}-{question.family}", "scene_id": scene_id, "family": question.family, "image": image,
        "question": question.question, "answer": question.answer, "boxes": boxes,
    }  # fmt: skip


def animation(frames: list[np.ndarray]) -> bytes:
    """[H, W, 3] uint8 each -> the bytes of an animated PNG, which keeps only what changes from frame to frame."""
    buffer, pictures = io.BytesIO(), [Image.fromarray(frame) for frame in frames]
    pictures[0].save(buffer, "PNG", save_all=True, append_images=pictures[1:], duration=500, optimize=True)
    return buffer.getvalue()


def grown(image: np.ndarray, scale: int = SCALE) -> np.ndarray:
    """``image`` [H, W, 3], ``scale`` times as large."""
    return image.repeat(scale, 0).repeat(scale, 1)


def draw_files(suites: Iterable[str], build: Callable[[str, Path], None], description: str | None) -> None:
    """The command line of a module that draws test splits: every suite into its file.

    Args:
        build: draws a suite and writes it to a path.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="a folder for them (default: where the package has them)")
    args = parser.parse_args()
    for suite in suites:
        path = suite_file(suite) if args.out is None else args.out / suite_file(suite).name
        build(suite, path)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    """Command line: draw the test split."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=TEST_FILE)
    args = parser.parse_args()
    build(args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
