"""Places that several methods draw on: spread evenly over a raster, or at random, the same everywhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def spread(grid: tuple[int, int], k: int, device: torch.device | str = "cpu") -> Tensor:
    """k places spread evenly over a raster, centred, as sorted unique raster indices.

    The number of rows is the one that makes cells square, sqrt(k * rows / cols), as near as k allows. The k places are
    dealt to them as evenly as integers can be, and stand at the centres of equal parts of their row.

    Args:
        grid: (rows, cols) of the raster.
        k: how many places, 1 <= k <= rows * cols.
        device: where the result lives.

    Returns:
        `[k]` int64, strictly increasing.

    Raises:
        ValueError: k is out of range.
    """
    height, width = grid
    if not 1 <= k <= height * width:
        raise ValueError(f"A raster of {height} x {width} has no {k} different places.")
    rows = round(math.sqrt(k * height / width))
    rows = min(max(rows, -(-k // width)), height, k)
    # place t is number j of the `count` places of row i; row i owns the places from i * k // rows on
    t = torch.arange(k, device=device)
    i = ((t + 1) * rows - 1) // k
    start = i * k // rows
    count = (i + 1) * k // rows - start
    row = (2 * i + 1) * height // (2 * rows)
    column = (2 * (t - start) + 1) * width // (2 * count)
    return row * width + column


_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: the increment of the splitmix64 generator


def _signed(value: int) -> int:
    """The int64 that has the same 64 bits as `value` modulo 2^64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    # int64 shifts copy the sign bit, the hash needs zeros
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, elementwise on int64 with wrap-around; a bijection."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def hash_tokens(keys: Tensor, num_tokens: int, seed: int) -> Tensor:
    """A random number for each token of each image, the same on every device and in every batch.

    Args:
        keys: `[M]` int64, one per image.
        num_tokens: N.
        seed: any integer.

    Returns:
        `[M, N]` int64, uniform over all 64-bit values, distinct within a row.
    """
    start = _mix(keys ^ _signed((seed + 1) * _GOLDEN))[:, None]
    places = torch.arange(1, num_tokens + 1, device=keys.device)
    return _mix(start + places * _signed(_GOLDEN))
