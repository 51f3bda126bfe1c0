"""Tiny random models of image-text classes that have no file of their own, or a small one, and batches for them.

Built from configs, so without hub and processor. A class has one builder, `@zoo(batch)`, in `_zoo_pictures.py`
(pictures of one size, or tiles) or `_zoo_patches.py` (pictures as packed patches of any size). Layouts are drawn by
seed: rows with several pictures, with one and with none, padded on the left.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from _tiny import EOS, IMAGE, PAD, TEXT
from torch import Tensor

VIDEO, START, END, BREAK = 6, 3, 4, 7
SPECIAL = [*range(8), *range(60, 64)]  # no words
VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
"""Sizes of every tiny tower."""
SAM = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 48, "window_size": 4,
    "global_attn_indexes": [1], "num_pos_feats": 8,
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}  # fmt: skip
"""Keys and values from a latent, as in DeepSeek's decoders."""

_ROWS = ([1, 2], [2, 1], [1, 0, 2], [3, 1], [2, 2])

Batch = dict[str, Tensor]
Writes = Callable[["Rows"], Batch]


class Rows:
    """Writes a batch by seed: how many pictures each row has, their sizes, and words between them."""

    def __init__(self, seed: int, pictures: list[int] | None = None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.pictures = _ROWS[self.below(len(_ROWS))] if pictures is None else pictures
        self.total = sum(self.pictures)
        self._rows: list[list[int]] = []

    def below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def words(self, count: int) -> list[int]:
        return torch.randint(8, 60, (count,), generator=self.generator).tolist()

    def pixels(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def grids(self) -> list[tuple[int, int]]:
        """(rows, cols) of the tokens of each picture."""
        return [(2 + self.below(2), 3 + self.below(2)) for _ in range(self.total)]

    def write(self, parts: Sequence[list[int]]) -> Batch:
        """Ids and mask of the rows; `parts` are the placeholders of each picture, and what stands around them."""
        left = list(parts)
        for row, count in enumerate(self.pictures):
            tokens = self.words(2 + row)
            for _ in range(count):
                tokens += left.pop(0) + self.words(2)
            self._rows.append(tokens + self.words(4))
        length = max(map(len, self._rows))
        ids = [[PAD] * (length - len(tokens)) + tokens for tokens in self._rows]
        mask = [[0] * (length - len(tokens)) + [1] * len(tokens) for tokens in self._rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


# --- batches of one form ----------------------------------------------------------------------------------------------


def fixed(count: int, side: int, pixels: str = "pixel_values", around: tuple[int, ...] = ()) -> Writes:
    """Square pictures of one size, each of `count` tokens between the two tokens `around`."""

    def write(rows: Rows) -> Batch:
        placeholders = [*around[:1], *[IMAGE] * count, *around[1:]]
        return {**rows.write([placeholders] * rows.total), pixels: rows.pixels(rows.total, 3, side, side)}

    return write


def tiles(count: int, side: int) -> Writes:
    """Pictures of a prompt as tiles of `count` tokens with a word before them; prompts are filled up with zeros."""

    def write(rows: Rows) -> Batch:
        batch = rows.write([rows.words(1) + [IMAGE] * count for _ in range(rows.total)])
        pixels = torch.zeros(len(rows.pictures), max(rows.pictures), 3, side, side)
        for row, pictures in enumerate(rows.pictures):
            pixels[row, :pictures] = rows.pixels(pictures, 3, side, side)
        return {**batch, "pixel_values": pixels}

    return write


def sized(stride: int) -> Writes:
    """Pictures of their own sizes in a frame of zeros, `stride` pixels a token each way (Pixtral)."""

    def write(rows: Rows) -> Batch:
        grids = rows.grids()
        sizes = torch.tensor(grids) * stride
        batch = rows.write([[IMAGE] * (high * wide) for high, wide in grids])
        pixels = rows.pixels(rows.total, 3, *sizes.amax(0).tolist())
        return {**batch, "pixel_values": pixels, "image_sizes": sizes}

    return write


def packed(
    moments: int = 2, unfolded: bool = False, types: bool = True, count: Callable[[int, int], int] | None = None
) -> Writes:
    """Pictures as patches in one long row, 2 x 2 of them a token (Qwen's towers and those after them).

    Args:
        moments: frames that a patch spans.
        unfolded: patches come as `[3, 4, 4]`, not flat.
        types: whether the model is told which tokens are pictures.
        count: placeholders of a picture of so many rows and columns; by default one a token.
    """

    def write(rows: Rows) -> Batch:
        grids = rows.grids()
        lengths = [high * wide if count is None else count(high, wide) for high, wide in grids]
        batch = rows.write([[START] + [IMAGE] * length + [END] for length in lengths])
        patches = 4 * sum(high * wide for high, wide in grids)
        pixels = rows.pixels(patches, 3 * moments * 4 * 4)
        batch["pixel_values"] = pixels.view(-1, 3, 4, 4) if unfolded else pixels
        batch["image_grid_thw"] = torch.tensor([[1, 2 * high, 2 * wide] for high, wide in grids])
        if types:
            batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
        return batch

    return write


# --- families ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """One class.

    Attributes:
        make: its class and a config of a tiny model.
        write: a batch for it.
        attention: "sdpa", or "eager" where it has no other.
    """

    make: Callable[[], tuple[type, Any]]
    write: Writes
    attention: str = "sdpa"


FAMILIES: dict[str, Family] = {}


def zoo(write: Writes, attention: str = "sdpa") -> Callable[[Any], Any]:
    """Register a builder under its own name."""

    def note(make: Any) -> Any:
        FAMILIES[make.__name__] = Family(make, write, attention)
        return make

    return note


def made(name: str) -> tuple[type, Any]:
    """Class and config of a family; older releases of transformers do not have all of them."""
    try:
        return FAMILIES[name].make()
    except ImportError as error:
        pytest.skip(f"this transformers has no {name}: {error}")


@functools.cache
def zoo_model(name: str, seed: int = 0) -> Any:
    """The tiny model of a family, one for all tests, so that it has to be made where torch makes single precision."""
    if torch.get_default_dtype() is not torch.float32:
        raise RuntimeError(f"{name} would be in double precision for all tests; make it before `in_double()`.")
    return random_model(*made(name), FAMILIES[name].attention, seed)


def random_model(cls: type, config: Any, attention: str = "sdpa", seed: int = 0) -> Any:
    """A model of a config; its weights are so large that logits differ."""
    torch.manual_seed(seed)
    config._attn_implementation = attention
    try:
        model = cls(config).eval()
    except ImportError as error:
        pytest.skip(f"{cls.__name__} needs a package that is not installed: {str(error).strip().partition(chr(10))[0]}")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5 * 1.5)
            elif not bool(torch.isfinite(parameter).all()):  # left as it was allocated
                parameter.normal_(0.0, 0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def zoo_batch(name: str, case: str = "", pictures: list[int] | None = None) -> Batch:
    """Inputs of a family; `case` decides the layout, of rows with so many `pictures` each if they are given."""
    batch = FAMILIES[name].write(Rows(zlib.crc32(f"{name} {case}".encode()), pictures))
    if name in _FAILS_BY_ITSELF:
        _skip_if_stock_fails(zoo_model(name), batch)
    return batch


_FAILS_BY_ITSELF = ("minicpmv4_6",)
"""Families whose stock class fails for pictures of several sizes in releases that are supported: it is called."""


def _skip_if_stock_fails(model: Any, batch: Batch) -> None:
    """In single precision, also where all else is computed in double."""
    single = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in batch.items()}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            model(**single)
    except RuntimeError as error:
        if "is invalid for input of size" not in str(error):
            raise
        pytest.skip(f"transformers' own {type(model).__name__} fails for pictures of several sizes here: {error}")
    finally:
        torch.set_default_dtype(before)


__all__ = [
    "BREAK", "END", "EOS", "EXPERTS", "FAMILIES", "IMAGE", "LATENT", "PAD", "SAM", "SPECIAL", "START", "TEXT",
    "VIDEO", "VIT", "Batch", "Rows", "fixed", "made", "packed", "random_model", "sized", "tiles", "zoo",
    "zoo_batch", "zoo_model",
]  # fmt: skip
