"""Keeps k visual tokens at random, without replacement: the control that every method must beat.

Paper: none, this is the mandatory control. UniPruneBench (https://arxiv.org/abs/2511.02650) finds it to be a
surprisingly strong baseline.
Official code: none.
Licence: none needed, written for this library.
Deviations: papers draw from a generator and so depend on the order of the samples; here every image has its own
randomness, derived from the seed and from what the image is, so that batch size and order change nothing (our choice).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.view import View
from tokenprune.registry import register_method

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


@register_method("random")
@dataclass
class Random(Pruner):
    """Ranks the N tokens by a stateless integer hash of (seed, image, place) and keeps the k highest.

    Attributes:
        seed: any integer; another seed draws another subset. The subset also depends on the image (`View.keys`,
            `[M]`), so that equal seeds do not mean equal places in every image.
    """

    published: ClassVar[str] = "control, no paper"

    seed: int = 0

    def score(self, view: View) -> Tensor:
        return hash_tokens(view.keys(), view.num_tokens, self.seed)
