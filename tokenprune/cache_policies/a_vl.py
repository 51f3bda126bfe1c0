"""Keeps the visual keys that get attention, reads the best of them at most steps, and thins text by head (A-VL).

Source: "A-VL: Adaptive Attention for Large Vision-Language Models", arXiv 2409.14846 (AAAI 2025), and
2147483647-2/A-VL (MIT; this file was written from the policy, no code was copied).

Per layer, with s_j the attention of the last row to visual token j, mean over heads, and N tokens of a picture:

- Behind the prompt the int(secondary N) tokens with the largest s stay, the others leave. Of those the int(core N) best
  are the core; the others wait beside the cache, so that a step reads core, text and what stands before the picture
  alone. Every `refresh` steps all are back, and the core is chosen anew by that step's s.
- Of the T tokens of text behind the picture, decoded ones counted, max(round(text T), least_text) stay in each key head
  at all times: the last of them, and of the others the int(heavy x size) that were attended to most, summed over all
  rows of text so far.

Readings and deviations:
- Defaults are those of the shipped evaluation (secondary 0.5, core 0.3, refresh 3, text 0.6); the command line of the
  code has core 0.4, refresh off, text 0.5. `heavy` and `least_text` are the command line's.
- The code masks what is no core and saves nothing; here the keys are not there, so reads shrink. Nothing is stored
  twice: what waits is moved.
- Heads of a group share a key, so what a key gets is summed over them (the code wants as many key heads as heads).
- Several pictures: each with the same shares; text between them is text. Rows without pictures keep all. N counts what
  is left of a picture in the layer, so that it composes with methods.
- The optional drop inside the prefill is not here: compose with "fastv".
- Text that a later turn adds reads all, and steps count anew from there. A picture in a later turn is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.cache_policy import CachePolicy, Kept, LayerKeys, most, shares
from tokenprune.interfaces.intervention import DecoderInfo, Facts
from tokenprune.registry import register_cache_policy


@register_cache_policy("a_vl")
@dataclass
class AVL(CachePolicy):
    """Visual keys in three ranks, and a window of text by head.

    Attributes:
        secondary: share of a picture's keys that stay in the cache, in (0, 1].
        core: share of them that most steps read, at most `secondary`.
        refresh: every so many steps all that stayed are read and ranked anew; -1: always all, without a core.
        text: share of the text behind a picture that stays, in (0, 1]; 1: all.
        heavy: share of it that is chosen by attention; the rest are the last tokens.
        least_text: so many tokens of text stay in any case.
    """

    published: ClassVar[str] = "arXiv 2409.14846, 2147483647-2/A-VL"

    secondary: float = 0.5
    core: float = 0.3
    refresh: int = 3
    text: float = 0.6
    heavy: float = 0.7
    least_text: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("secondary", True), ("core", True), ("text", True), ("heavy", False)):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 0 <= value <= 1
                or value < least * 1e-9
            ):
                raise ValueError(f"{name} is a share, in {'(' if least else '['}0, 1], got {value!r}.")
        if type(self.refresh) is not int or (self.refresh < 1 and self.refresh != -1):
            raise ValueError(f"refresh must be a number of steps from 1 on, or -1, got {self.refresh!r}.")
        if type(self.least_text) is not int or self.least_text < 1:
            raise ValueError(f"least_text must be a number of tokens from 1 on, got {self.least_text!r}.")
        if self.refresh > 0 and self.core > self.secondary:
            raise ValueError(
                f"core is chosen among what stays, so it can be no larger than secondary={self.secondary}, got "
                f"{self.core}."
            )

    @property
    def ranks(self) -> bool:
        """Whether a core is told from what waits."""
        return self.refresh > 0 and self.core < self.secondary

    def prepare(self, decoder: DecoderInfo) -> tuple[int, ...]:
        layers = super().prepare(decoder)
        return layers if self.secondary < 1 or self.ranks or self.text < 1 else ()

    def asked(self, step: int) -> bool:
        return step == 0 or self.text < 1 or self.reads_all(step)

    def reads_all(self, step: int) -> bool:
        return self.ranks and step % self.refresh == 0

    def keep(self, given: LayerKeys) -> Kept:
        seen = given.image > 0
        stays, aside = seen, None
        first = "core" not in given.known
        if first or self.reads_all(given.step):
            scores = given.last_row()
            pictures = [given.image == number for number in range(1, given.pictures + 1)]
            if first:
                sizes = torch.stack([own.sum(1) for own in pictures], dim=1)  # [B, pictures]
                given.known["core"] = shares(self.core, sizes)
                stays = _union(most(scores, own, shares(self.secondary, sizes[:, i])) for i, own in enumerate(pictures))
            if self.ranks:
                core = given.known["core"]
                best = _union(most(scores, own & stays, core[:, i]) for i, own in enumerate(pictures))
                stays, aside = best, stays & ~best
        read = (given.real & ~seen & ~given.text) | stays
        if self.text == 1:
            return Kept((read | (given.real & given.text))[:, None], aside)
        return Kept(read[:, None] | self._window(given), aside)

    def _window(self, given: LayerKeys) -> Tensor:
        """`[B, Hk, K]` bool, the text that stays."""
        text = given.text & given.real  # [B, K]
        held, rows = text.sum(1), given.query.shape[2]
        new = text[:, text.shape[1] - rows :]  # rows of text of this call
        got = given.noted.get("got")
        got = torch.zeros(given.key.shape[:3], device=text.device) if got is None else got
        start = int(new.any(0).int().argmax()) if rows > 1 else 0
        for part, weights in given.weights(start):
            paid = (weights * new[:, None, part, None]).sum(2)  # [B, H, K]
            got = got + paid.unflatten(1, (got.shape[1], -1)).sum(2)
        given.noted["got"] = got * text[:, None]
        count = new.sum(1) + given.known.get("text", 0)
        given.known["text"] = count
        size = (self.text * count.double()).round().long().clamp(min=self.least_text)  # [B]
        heavy = shares(self.heavy, size)
        behind = text.flip(1).cumsum(1).flip(1)  # which from the end a token of text is
        recent = text & (behind <= (size - heavy)[:, None])
        among = (text & ~recent)[:, None].expand_as(got)
        window = most(got, among, heavy[:, None].expand(-1, got.shape[1])) | recent[:, None]
        return torch.where((held <= size)[:, None, None], text[:, None], window)

    def watch_flops(self, given: LayerKeys) -> int:
        batch, heads, rows, width = given.query.shape
        if self.text < 1:
            new = (given.text & given.real)[:, -rows:]
            rows = 1 + rows - int(new.any(0).int().argmax())
        else:
            rows = 1
        return 2 * batch * heads * rows * given.key.shape[2] * width

    def summary(self, noted: Mapping[int, Facts]) -> str:
        said = f"{self.secondary:g} of a picture's keys stay"
        said += f", {self.core:g} are read, all of them every {self.refresh} steps" if self.ranks else ""
        return said + (f"; {self.text:g} of the text behind it stays by head" if self.text < 1 else "")


def _union(masks: object) -> Tensor:
    found: Tensor | None = None
    for mask in masks:  # type: ignore[attr-defined]
        found = mask if found is None else found | mask
    if found is None:
        raise ValueError("a_vl was asked about a prompt without pictures.")
    return found
