"""Where the visual tokens of a batch of prompts are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tokenprune.interfaces.visual import Pictures, Visual, joined


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
        order: for each span, its place in the order in which the vision tower saw the visuals of its kind; where it saw
            tiles, the place in `tiles`.
        batch_size: rows.
        length: tokens a row, padding counted.
        tiles: by kind, which of the tower's visuals each picture is made of; kinds that are not in it are of one each.
        notes: what a reader must know of how the prompts were read.
    """

    spans: tuple[Span, ...]
    batch_size: int
    length: int
    order: tuple[int, ...] = ()
    tiles: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def visual_tokens(self) -> int:
        """Tokens that methods can choose among, in the whole batch; separators are not counted."""
        return sum(span.num_tokens for span in self.spans)

    def order_of(self, kind: str, visual: int) -> int:
        """The place in `order` of the picture that holds number `visual` of what the tower saw of its kind."""
        tiles = self.tiles.get(kind)
        return visual if tiles is None else next(place for place, own in enumerate(tiles) if visual in own)


class _Placed(NamedTuple):
    """A visual and its placeholders `[P]` in a row; `order` among those of its kind."""

    row: int
    places: Tensor
    order: int
    visual: Visual


Grouping = Callable[[str, int, Sequence[Tensor]], "Pictures | None"]
"""(kind, row, places of each of the row's visuals) -> which of them make its pictures, see `Adapter.pictures`."""


def build_layout(
    placeholders: dict[str, Tensor], visuals: dict[str, Sequence[Visual]], pictures: Grouping | None = None
) -> Layout:
    """Lay visuals over the places that the prompts keep for them.

    Args:
        placeholders: by kind ("image", "video"), `[B, S]` bool on the CPU, True at its placeholders.
        visuals: by kind, the visuals of the batch in tower order.
        pictures: says which of them are tiles of one picture.

    Raises:
        ValueError: the places and the visuals do not fit together.
    """
    batch_size, length = next(iter(placeholders.values())).shape
    placed: list[_Placed] = []
    tiles: dict[str, tuple[tuple[int, ...], ...]] = {}
    notes: list[str] = []
    for kind, mask in placeholders.items():
        found = _placed(kind, mask, visuals.get(kind, ()))
        if pictures is not None:
            groups, grids, said = _grouped(kind, found, pictures)
            notes += said
            if len(groups) < len(found):
                tiles[kind] = tuple(tuple(tile.order for tile in group) for group in groups)
                found = [_joined(*own, place) for place, own in enumerate(zip(groups, grids))]
        placed += found
    placed.sort(key=lambda one: (one.row, int(one.places[0])))
    spans: list[Span] = []
    for one in placed:
        image = spans[-1].image + 1 if spans and spans[-1].sample == one.row else 0
        spans.append(Span(one.row, image, one.visual, one.places))
    order = tuple(one.order for one in placed)
    return Layout(tuple(spans), batch_size, length, order, tiles, tuple(dict.fromkeys(notes)))


def _placed(kind: str, mask: Tensor, items: Sequence[Visual]) -> list[_Placed]:
    """The visuals of one kind, each at its placeholders."""
    total, expected = int(mask.sum()), sum(visual.length for visual in items)
    if total != expected:
        raise ValueError(
            f"The prompts hold {total} {kind} tokens, but the {len(items)} {kind}(s) passed with them make "
            f"{expected} visual tokens. Build the inputs with the model's own processor, {kind}s and text in one "
            "call."
        )
    rows, places = torch.nonzero(mask, as_tuple=True)
    placed: list[_Placed] = []
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
        placed.append(_Placed(first, places[of_visual], order, visual))
        cursor += visual.length
    return placed


def _grouped(
    kind: str, placed: Sequence[_Placed], pictures: Grouping
) -> tuple[list[list[_Placed]], list[tuple[int, int] | None], list[str]]:
    """The visuals of one kind by picture, grids of pictures whose visuals are single tokens, and what is to be said of
    prompts that do not tell."""
    groups: list[list[_Placed]] = []
    grids: list[tuple[int, int] | None] = []
    notes: list[str] = []
    for row, of_row in itertools.groupby(placed, key=lambda one: one.row):
        rest = list(of_row)
        said = pictures(kind, row, [one.places for one in rest])
        if said is None:
            groups += [[one] for one in rest]
            grids += [None] * len(rest)
            continue
        if sum(said.counts) != len(rest) or min(said.counts) < 1:
            raise ValueError(f"{len(rest)} tiles of a prompt cannot be {said.counts} by picture.")
        notes += [said.note] if said.note else []
        grids += [None] * len(said.counts) if said.grids is None else said.grids
        for count in said.counts:
            groups.append(rest[:count])
            rest = rest[count:]
    return groups, grids, notes


def _joined(group: Sequence[_Placed], grid: tuple[int, int] | None, place: int) -> _Placed:
    whole = joined([tile.visual for tile in group], grid)
    return _Placed(group[0].row, torch.cat([tile.places for tile in group]), place, whole)
