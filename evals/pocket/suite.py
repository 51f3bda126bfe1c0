"""The pocket suite: a visual question answering benchmark on scenes whose every object's box is known.

``python -m tokenprune.evals.pocket.suite`` draws the committed test split anew (it needs the package easy-vqa);
`load` reads it and needs neither that package nor a network.
"""

from __future__ import annotations

import argparse
import io
import random
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from tokenprune.evals.pocket.questions import FAMILIES, WHOLE_IMAGE, Question, ask
from tokenprune.evals.pocket.scenes import SIZE, SPLIT_SEED, make_scene

ALL_FAMILIES = (*FAMILIES, "easy_vqa")
TEST_FILE = Path(__file__).parent / "data" / "test.parquet"
TEST_SCENES = 300
TEST_EASY = 210
COLUMNS = ("sample_id", "scene_id", "family", "image", "question", "answer", "boxes")

_FEATURES = Features(
    {
        "sample_id": Value("string"), "scene_id": Value("string"), "family": Value("string"), "image": Image(),
        "question": Value("string"), "answer": Value("string"), "boxes": List(List(Value("float32"))),
    }
)  # fmt: skip


def load(split: str = "test", scenes: int = 100) -> Dataset:
    """The suite as a ``datasets.Dataset`` with the columns of `COLUMNS`.

    Rows go round the families, so every prefix is balanced. ``boxes`` are (x0, y0, x1, y1) in pixels of the 336 x 336
    image; the patches that they touch suffice for the answer. "test" is the committed file, the same for everyone, with
    a third-party family (easy-VQA) in it. "train" and "val" are drawn on the fly, ``scenes`` of them, from seeds that
    the test split does not use.
    """
    if split == "test":
        table = pq.read_table(TEST_FILE)
        rows = {name: table.column(name).to_pylist() for name in COLUMNS}
        return Dataset.from_dict(rows, features=_FEATURES)
    if split not in SPLIT_SEED:
        raise ValueError(f"The pocket suite has the splits test, val and train, not {split!r}.")
    return Dataset.from_dict(_columns(_scene_rows(split, scenes)), features=_FEATURES)


def answer_matches(prediction: str, answer: str) -> bool:
    """Whether they are equal but for case, surrounding space and final punctuation."""
    return _normalised(prediction) == _normalised(answer)


def build(path: Path = TEST_FILE) -> None:
    """Draw the test split and write it; equal images are stored once."""
    rows = _columns(_interleave(_scene_rows("test", TEST_SCENES), _easy_rows(TEST_EASY)))
    encoded = {name: rows[name] for name in COLUMNS if name != "image"}
    images = pa.array([image["bytes"] for image in rows["image"]], pa.binary())
    pictures = pa.StructArray.from_arrays([images, pa.nulls(len(images), pa.string())], ["bytes", "path"])
    table = pa.table(encoded).add_column(COLUMNS.index("image"), "image", pictures)
    # one row group and one large dictionary page: the rows that share a picture share its bytes
    pq.write_table(
        table,
        path,
        use_dictionary=True,
        dictionary_pagesize_limit=1 << 27,
        row_group_size=len(images),
        compression="zstd",
    )


def png(image: np.ndarray) -> bytes:
    """[H, W, 3] uint8 -> PNG bytes, with a palette where 256 colours hold the picture exactly."""
    picture = PILImage.fromarray(image)
    if picture.getcolors(256) is not None:
        packed = image.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
        codes, index = np.unique(packed, return_inverse=True)
        colours = codes[:, None] >> np.array([16, 8, 0], np.uint32) & 255
        picture = PILImage.fromarray(index.reshape(image.shape[:2]).astype(np.uint8), "P")
        picture.putpalette(colours.astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _row(sample_id: str, scene_id: str, image: bytes, question: Question) -> dict:
    return {
        "sample_id": sample_id, "scene_id": scene_id, "family": question.family,
        "image": {"bytes": image, "path": None}, "question": question.question, "answer": question.answer,
        "boxes": [list(box) for box in question.boxes],
    }  # fmt: skip


def training_rows(scenes: int, start: int) -> list[dict]:
    """Scenes `start` to `start + scenes` of the training split, a question of every family about each; ``image`` as
    bytes."""
    return _scene_rows("train", scenes, start)


def _scene_rows(split: str, scenes: int, start: int = 0) -> list[dict]:
    """One question of every family about each scene; scene by scene, so the rows go round the families."""
    rows = []
    for i in range(start, start + scenes):
        scene = make_scene(SPLIT_SEED[split] + i)
        picture, rng = png(scene.image), random.Random(SPLIT_SEED[split] + i)
        for family in FAMILIES:
            question = ask(scene, family, rng)
            if question is not None:
                rows.append(_row(f"{split}-{i:04d}-{family}", f"{split}-{i:04d}", picture, question))
    return rows


def _easy_rows(number: int) -> list[dict]:
    from tokenprune.evals.pocket.easy_vqa import easy_split

    easy, rng = easy_split("test"), random.Random(0)
    rows = []
    for k, i in enumerate(rng.sample(range(len(easy.images)), number)):
        question, answer = rng.choice(easy.questions[i])
        asked = Question("easy_vqa", question, answer, (WHOLE_IMAGE,))
        rows.append(_row(f"easy-{k:04d}", f"easy-{k:04d}", png(easy.image(i, SIZE)), asked))
    return rows


def _interleave(scene_rows: list[dict], easy_rows: list[dict]) -> list[dict]:
    """An easy-VQA row after every scene's six until they run out."""
    rows, easy = [], iter(easy_rows)
    for k, row in enumerate(scene_rows):
        rows.append(row)
        if (k + 1) % len(FAMILIES) == 0:
            rows += [extra] if (extra := next(easy, None)) else []
    return rows + list(easy)


def _columns(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in COLUMNS}


def _normalised(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(".!?").strip().lower()


def main() -> None:
    """Command line: draw the test split."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=TEST_FILE)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    build(args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
