"""The class that a cache policy derives from, and what it is given.

A cache policy says which keys stay in the KV cache, layer by layer, and which of those that stay a decode step reads.
It is asked behind the attention of a layer, in a prompt and in the steps that it names; what it lets go of leaves when
the call is over. Keys that it sets aside wait beside the cache, and are back before a step that reads all. It takes no
part in what a call computes: that call attended to all keys that were there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.intervention import Attended, Facts, Intervention

_BLOCK = 64  # rows at a time


@dataclass(frozen=True)
class LayerKeys:
    """The keys of one layer behind its attention in one call; those of the call's S tokens are the last.

    Attributes:
        layer: which, from 0.
        query: `[B, H, S, d]`, rotated.
        key: `[B, Hk, K, d]`, rotated; what waits beside the cache is not among them.
        scale: what the dot products are multiplied by.
        allowed: `[B or 1, S, K]` bool, True where a row sees a key; None: every row sees all keys.
        image: `[B, K]` int64: 0 at a token of no picture, i at one of the i-th picture of its row.
        text: `[B, K]` bool, text behind a row's first picture, decoded tokens among it; a row without pictures has
            none.
        real: `[B, K]` bool, False at padding.
        last: `[B]` int64, the last row of each sample that is no padding.
        pictures: how many pictures a row has at most.
        step: 0 in a call of several tokens; else how many tokens were decoded since, this one counted.
        noted: by name, `[B, Hk, K]`, what it noted on keys, zeros at new ones; it may write here.
        known: by name, `[B, ...]`, what it noted on rows; it may write here.
        attended: `[B, H, 1, K]` fp32, the weights of a decoded row; None in a call of several tokens.
    """

    layer: int
    query: Tensor
    key: Tensor
    scale: float
    allowed: Tensor | None
    image: Tensor
    text: Tensor
    real: Tensor
    last: Tensor
    pictures: int
    step: int
    noted: dict[str, Tensor] = field(default_factory=dict)
    known: dict[str, Tensor] = field(default_factory=dict)
    attended: Tensor | None = None

    def weights(self, start: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Attention of the rows from `start` on, `[B, H, r, K]` fp32, a block at a time with the rows that it is of."""
        rows = self.query.shape[2]
        if self.attended is not None:
            yield slice(0, 1), self.attended
            return
        for first in range(start, rows, _BLOCK):
            part = slice(first, min(first + _BLOCK, rows))
            allowed = None if self.allowed is None else self.allowed[:, None, part]
            yield part, open_weights(self.query[:, :, part], self.key, self.scale, allowed)

    def last_row(self) -> Tensor:
        """`[B, K]` fp32, the weights of each sample's last row, mean over heads."""
        if self.attended is not None:
            return self.attended[:, :, 0].mean(1)
        at = self.last[:, None, None, None]
        query = self.query.gather(2, at.expand(-1, self.query.shape[1], 1, self.query.shape[3]))
        allowed = None
        if self.allowed is not None:
            seen = self.allowed.expand(query.shape[0], -1, -1)
            allowed = seen.gather(1, self.last[:, None, None].expand(-1, 1, seen.shape[2]))[:, None]
        return open_weights(query, self.key, self.scale, allowed)[:, :, 0].mean(1)


def open_weights(query: Tensor, key: Tensor, scale: float, allowed: Tensor | None) -> Tensor:
    """`[B, H, r, K]` fp32: softmax of the scaled products of `[B, H, r, d]` and `[B, Hk, K, d]`, where
    `[B or 1, 1, r, K]` allows; a row that sees no key gets something finite."""
    batch, heads, rows, width = query.shape
    key_heads, count = key.shape[1:3]
    grouped = query.reshape(batch * key_heads, heads // key_heads * rows, width)  # no key is copied
    scores = torch.bmm(grouped, key.reshape(batch * key_heads, count, width).transpose(1, 2)).float() * scale
    scores = scores.view(batch, heads, rows, count)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


@dataclass(frozen=True)
class Kept:
    """What becomes of the keys of a layer.

    Attributes:
        read: `[B, 1 or Hk, K]` bool, keys that steps attend to; of a row, as many in each head.
        aside: `[B, K]` bool, keys that wait beside the cache until a step reads all; None: none. All others leave.
    """

    read: Tensor
    aside: Tensor | None = None


@dataclass
class CachePolicy(Intervention):
    """What stays in the KV cache. Options are dataclass fields.

    Attributes:
        layers: decoder layers in which it acts, from 0; None is all, [] switches it off.
    """

    acts_on: ClassVar[str] = "none: keys"
    visual_only: ClassVar[bool] = True

    def asked(self, step: int) -> bool:
        """Whether `keep` is asked in a call, see `LayerKeys.step`."""
        return step == 0

    def reads_all(self, step: int) -> bool:
        """Whether what waits beside the cache is back in a call."""
        return False

    def keep(self, given: LayerKeys) -> Kept | None:
        """Which keys stay; None: all."""
        raise TypeError(f"{type(self).__name__} defines no keep().")

    def compress(
        self, module: Any, hidden: Tensor, key: Tensor, value: Tensor, weights: Any, given: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """For a policy that makes keys and values `[B, Hk, K', d]` of its own out of a prompt's, the same number in all
        heads: asked once in each layer, in place of `keep`. None: it does not.

        Args:
            module: the attention module.
            hidden: `[B, S, D]` that it was given.
            key: `[B, Hk, K, d]` of the cache.
            value: likewise.
            weights: what the module returned beside its output, None in most kinds of attention.
            given: the arguments of the module, by name.
        """
        return None

    @property
    def compresses(self) -> bool:
        """Whether `compress` is what it has."""
        return type(self).compress is not CachePolicy.compress

    def watch_flops(self, given: LayerKeys) -> int:
        """Matrix products of one `keep` in a call of several tokens (2 per multiply-add)."""
        return 0

    def attend(self, given: Attended) -> Tensor | None:
        return None

    def summary(self, noted: Mapping[int, Facts]) -> str:
        return ""


def most(scores: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """`[..., K]` bool: of the keys `among` `[..., K]` the `count` `[...]` with the largest scores, the earlier of
    equals first."""
    order = scores.masked_fill(~among, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    ranks = order.argsort(dim=-1)
    return among & (ranks < count[..., None])


def shares(share: float, of: Tensor) -> Tensor:
    """int(share N) of each, int64."""
    return (share * of.double()).floor().long()
