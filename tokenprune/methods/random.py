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

from torch import Tensor

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.view import View
from tokenprune.methods._places import hash_tokens
from tokenprune.registry import register_method


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
