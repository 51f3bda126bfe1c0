"""A tiny random LLaVA with a real processor, and a task of random pictures: folders that the CLI can be pointed at."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from _tiny import tiny_llava
from _tiny_processor import WORDS, tiny_processor, word_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """One token a word, the ids of `_tiny`."""
    return word_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llava().save_pretrained(folder)
    tiny_processor(tiny_tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A task of 60 questions in two families."""
    return write_task(tmp_path_factory.mktemp("task"), 60)


@pytest.fixture(scope="session")
def sized_task(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A task of four pictures of different sizes."""
    return write_task(tmp_path_factory.mktemp("sized"), 4, [(56, 28), (42, 42), (28, 56), (50, 36)])


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By family, a folder laid out as the hub's checkpoints are."""
    from _processors import prepares_pictures, save_checkpoint

    @functools.cache
    def saved(name: str) -> Path:
        if not prepares_pictures(name):
            pytest.skip(f"this transformers needs torchvision for the pictures of {name}")
        folder = tmp_path_factory.mktemp("hub") / name
        save_checkpoint(name, folder)
        return folder

    return saved


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By name, the folder of a checkpoint of the zoo whose processor loads here."""
    from _zoo_processors import STOCK, save_stock

    @functools.cache
    def saved(name: str) -> Path:
        if STOCK[name].torchvision:
            pytest.importorskip("torchvision", exc_type=ImportError)
        folder = tmp_path_factory.mktemp("stock") / name
        save_stock(name, folder)
        return folder

    return saved


def write_task(folder: Path, count: int, sizes: Sequence[tuple[int, int]] = ((42, 42),)) -> str:
    """`count` pictures whose (width, height) go round `sizes`."""
    import numpy as np
    from datasets import Dataset, Features, Image, List, Value

    rng = np.random.default_rng(0)
    rows = [
        {
            "image": rng.integers(0, 255, (*sizes[i % len(sizes)][::-1], 3), dtype=np.uint8),
            "question": " ".join(rng.choice(WORDS[:11], size=2 + i % 3)),
            "answer": "yes" if i % 2 else "no",
            "kind": "even" if i % 2 == 0 else "odd",
            "name": f"s{i}",
            "boxes": [[0.1, 0.1, 0.4, 0.5]],
        }
        for i in range(count)
    ]
    features = Features(
        {
            "image": Image(), "question": Value("string"), "answer": Value("string"), "kind": Value("string"),
            "name": Value("string"), "boxes": List(List(Value("float32"))),
        }
    )  # fmt: skip
    Dataset.from_list(rows, features=features).to_parquet(folder / "questions.parquet")
    spec = {
        "name": "toy", "data": "questions.parquet", "max_new_tokens": 4,
        "columns": {"family": "kind", "id": "name", "boxes": "boxes"},
    }  # fmt: skip
    path = folder / "toy.yaml"
    path.write_text(json.dumps(spec))
    return str(path)


@pytest.fixture(scope="session")
def tiny(tiny_folder: str):
    from tokenprune.evals.models.load import load_model

    return load_model(tiny_folder)
