"""Where the visual tokens of a batch of prompts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.interfaces.visual import Visual


@dataclass(frozen=True, eq=False)
class Span:
    """One visual of one prompt.

    Attributes:
        sample: row of the batch.
        image: place among the visuals of that prompt, from 0.
        visual: how it is laid out.
        places: `[P]` int64 on the CPU, where its placeholders stand in the row, padding counted.
    """

    sample: int
    image: int
    visual: Visual
    places: Tensor

    @property
    def num_tokens(self) -> int:
        """N, tokens that a method can choose among."""
        return self.visual.num_tokens


@dataclass(frozen=True)
class Layout:
    """The visuals of a batch of prompts.

    Attributes:
        spans: one entry a visual, row by row and left to right.
        order: for each span, its place in the order in which the vision tower saw the visuals of its kind.
        batch_size: rows.
        length: tokens a row, padding counted.
    """

    spans: tuple[Span, ...]
    batch_size: int
    length: int
    order: tuple[int, ...] = ()

    @property
    def visual_tokens(self) -> int:
        """Tokens that methods can choose among, in the whole batch; separators are not counted."""
        return sum(span.num_tokens for span in self.spans)


def build_layout(placeholders: dict[str, Tensor], visuals: dict[str, Sequence[Visual]]) -> Layout:
    """Lay visuals over the places that the prompts keep for them.

    Args:
        placeholders: by kind ("image", "video"), `[B, S]` bool on the CPU, True at its placeholders.
        visuals: by kind, the visuals of the batch in tower order.

    Raises:
        ValueError: the places and the visuals do not fit together.
    """
    placed: list[tuple[int, int, int, Visual, Tensor]] = []
    batch_size, length = next(iter(placeholders.values())).shape
    for kind, mask in placeholders.items():
        items = visuals.get(kind, ())
        total, expected = int(mask.sum()), sum(visual.length for visual in items)
        if total != expected:
            raise ValueError(
                f"The prompts hold {total} {kind} tokens, but the {len(items)} {kind}(s) passed with them make "
                f"{expected} visual tokens. Build the inputs with the model's own processor, {kind}s and text in one "
                "call."
            )
        rows, places = torch.nonzero(mask, as_tuple=True)
        cursor = 0
        for order, visual in enumerate(items):
            if visual.length == 0:  # a prompt without pictures, in families that have an entry for each prompt
                continue
            of_visual = slice(cursor, cursor + visual.length)
            first, last = int(rows[cursor]), int(rows[cursor + visual.length - 1])
            gaps = int(places[cursor + visual.length - 1]) - int(places[cursor]) != visual.length - 1
            if first != last or (gaps and not visual.scattered):
                raise ValueError(
                    f"{kind.capitalize()} {order} should be {visual.length} {kind} tokens in a row within one prompt, "
                    "but its tokens are split. Build the inputs with the model's own processor."
                )
            placed.append((first, int(places[cursor]), order, visual, places[of_visual]))
            cursor += visual.length
    placed.sort(key=lambda entry: entry[:2])
    spans: list[Span] = []
    for sample, _, _, visual, places in placed:
        image = spans[-1].image + 1 if spans and spans[-1].sample == sample else 0
        spans.append(Span(sample, image, visual, places))
    return Layout(tuple(spans), batch_size, length, tuple(entry[2] for entry in placed))
