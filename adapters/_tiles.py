"""Which tiles make a picture, where the model is not told: read off the prompt, as the family's processor wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenprune.adapters._generic import Generic
from tokenprune.interfaces.visual import Pictures, Raster, Visual

_LONGEST = 24
"""Ids in front of a tile that are looked at: a label like <row_2_col_3> is one, or some ten where it is no token."""
_ROW_END = 2
"""Most ids between two tiles of a picture, the second's label aside: line ends."""

UNTOLD = (
    "Which tiles of a prompt make a picture could not be read off it (it is not as the family's processor writes it, "
    "or came as embeddings): keep counts for all tiles of such a prompt together."
)


@dataclass(frozen=True, eq=False)
class Tile(Visual):
    """One tile; its pixels are at `[row, place]` of those of the call."""

    row: int = 0
    place: int = 0


def tile_pixels(pixels: Tensor, tiles: Sequence[Visual]) -> list[Tensor]:
    """Of `[B, most tiles, ...]`, those of each tile."""
    return [pixels[tile.row, tile.place] for tile in tiles if isinstance(tile, Tile)]


class TiledPrompts(Generic):
    """A class whose features come by prompt: all tiles of one in a row."""

    def tile_raster(self, call: Mapping[str, Any]) -> Raster:
        """The tokens of a tile."""
        raise TypeError(f"{type(self).__name__} defines no tile_raster().")

    def visuals_behind(self, kind: str, call: Mapping[str, Any], output: Any) -> list[Visual]:
        raster = self.tile_raster(call)
        return [
            Tile((raster,), scattered=True, row=row, place=place)
            for row, features in enumerate(self.feature_rows(output))
            for place in range(len(features) // raster.num_tokens)
        ]

    def pixel_rows(self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        return tile_pixels(call[self.pixels[kind]], visuals)


class FramedPrompts(Generic):
    """A class whose processor writes the tiles of a picture between two ids."""

    def pictures(self, kind: str, ids: Tensor | None, places: Sequence[Tensor]) -> Pictures:
        return pictures_by_frame(ids, places)


def pictures_by_run(places: Sequence[Tensor]) -> Pictures:
    """Tiles in one unbroken run of placeholders are a picture: the processor puts something before and behind it.

    Args:
        places: see `Adapter.pictures`.
    """
    counts: list[int] = []
    end = None
    for own in places:
        if counts and int(own[0]) == end:
            counts[-1] += 1
        else:
            counts.append(1)
        end = int(own[-1]) + 1
    return Pictures(tuple(counts))


def pictures_by_label(ids: Tensor | None, places: Sequence[Tensor]) -> Pictures:
    """Each tile has a separator and a label in front, and a separator stands behind the whole picture, its last tile.

    Which ids these are the model does not know. The separator is the id behind the prompt's last tile, and that tile's
    label is that of all last ones. Everything else is then held against it: a prompt that was written in another way is
    taken as one picture, with a note.

    Args:
        ids, places: see `Adapter.pictures`.
    """
    if len(places) == 1:
        return Pictures((1,))
    counts = None if ids is None else _labelled(ids.tolist(), places)
    return Pictures((len(places),), UNTOLD) if counts is None else Pictures(counts)


def pictures_by_chain(ids: Tensor | None, places: Sequence[Tensor], crops: int) -> Pictures:
    """One separator in front of each picture and one behind, one alone between those side by side, and no labels; all
    pictures of a call are split into `crops`, or none is.

    A chain of pictures side by side that is no whole number of crops shows that none is split. Where all chains are,
    both could be: the prompt is taken as one picture, with a note.

    Args:
        ids, places: see `Adapter.pictures`.
        crops: tiles of a picture that is split.
    """
    if len(places) == 1:
        return Pictures((1,))
    chains = None if ids is None else _chains(ids.tolist(), places)
    if chains is None or all(chain % crops == 0 for chain in chains):
        return Pictures((len(places),), UNTOLD)
    return Pictures((1,) * len(places))


def pictures_by_frame(ids: Tensor | None, places: Sequence[Tensor]) -> Pictures:
    """One id in front of each picture and one behind it, and at most one between two tiles of a picture: a label of the
    tile, or the end of a line.

    Which ids these are the model does not know. Those of the first picture's front and of the last one's end are held
    against what stands between pictures; a prompt that was written in another way is taken as one picture, with a note.

    Args:
        ids, places: see `Adapter.pictures`.
    """
    if len(places) == 1:
        return Pictures((1,))
    counts = None if ids is None else _framed(ids.tolist(), places)
    return Pictures((len(places),), UNTOLD) if counts is None else Pictures(counts)


def pictures_by_marks(ids: Tensor | None, places: Sequence[Tensor], opening: int, closing: int) -> Pictures:
    """The ids in front of each picture and behind it are known; what stands between its tiles does not matter.

    Args:
        ids, places: see `Adapter.pictures`.
        opening, closing: the id that stands once in front of each picture, and the one that does behind it.
    """
    if len(places) == 1:
        return Pictures((1,))
    counts = None if ids is None else _marked(ids.tolist(), places, opening, closing)
    return Pictures((len(places),), UNTOLD) if counts is None else Pictures(counts)


def pictures_by_rows(ids: Tensor | None, places: Sequence[Tensor]) -> Pictures:
    """Each visual is one token; an id that is the same for all stands behind each row of a picture, and rows of one
    picture are as long as each other.

    Args:
        ids, places: see `Adapter.pictures`.
    """
    grids = None if ids is None else _in_rows(ids.tolist(), [int(own[0]) for own in places])
    if grids is None:
        return Pictures((len(places),), UNTOLD)
    return Pictures(tuple(rows * cols for rows, cols in grids), grids=grids)


def _in_rows(ids: list[int], places: Sequence[int]) -> tuple[tuple[int, int], ...] | None:
    """(rows, cols) of each picture; None where the prompt is not written as expected."""
    starts = [place for place, before in zip(places, [-1, *places]) if place != before + 1 or before < 0]
    ends = [place + 1 for place, after in zip(places, [*places[1:], -1]) if after != place + 1]
    if ends[-1] == len(ids) or len({ids[end] for end in ends}) > 1:
        return None
    grids: list[tuple[int, int]] = []
    before = None
    for start, end in zip(starts, ends):
        rows, cols = grids[-1] if start - 1 == before else (0, end - start)
        if cols != end - start:
            return None
        grids[len(grids) - (rows > 0) :] = [(rows + 1, cols)]
        before = end
    return tuple(grids)


def _marked(ids: list[int], places: Sequence[Tensor], opening: int, closing: int) -> tuple[int, ...] | None:
    """Tiles of each picture; None where the prompt is not written as expected."""
    starts = [int(own[0]) for own in places]
    ends = [int(own[-1]) + 1 for own in places]
    around = [[one for one in ids[e:s] if one in (opening, closing)] for e, s in zip([0, *ends], [*starts, len(ids)])]
    if around[0][-1:] != [opening] or around[-1][:1] != [closing]:
        return None
    counts = [1]
    for marks in around[1:-1]:
        if not marks:
            counts[-1] += 1
        elif marks[0] == closing and marks[-1] == opening:
            counts.append(1)
        else:
            return None
    return tuple(counts)


def _framed(ids: list[int], places: Sequence[Tensor]) -> tuple[int, ...] | None:
    """Tiles of each picture; None where the prompt is not written as expected."""
    starts = [int(own[0]) for own in places]
    ends = [int(own[-1]) + 1 for own in places]
    if any(end - start != len(own) for start, end, own in zip(starts, ends, places)):
        return None
    # a label may stand behind the one and in front of the other
    opening, closing = {*ids[max(0, starts[0] - 2) : starts[0]]}, {*ids[ends[-1] : ends[-1] + 2]}
    counts = [1]
    for end, start in zip(ends, starts[1:]):
        gap = ids[end:start]
        if len(gap) <= 1:
            counts[-1] += 1
        elif closing & {*gap[:2]} and opening & {*gap[-2:]}:
            counts.append(1)
        else:
            return None
    return tuple(counts)


def _chains(ids: list[int], places: Sequence[Tensor]) -> list[int] | None:
    """Tiles side by side; None where the prompt is not written as expected."""
    starts = [int(own[0]) for own in places]
    ends = [int(own[-1]) + 1 for own in places]
    whole = all(end - start == len(own) for start, end, own in zip(starts, ends, places))
    if not whole or ends[-1] == len(ids) or starts[0] == 0:
        return None
    separator = ids[ends[-1]]
    chains = [1]
    if ids[starts[0] - 1] != separator:
        return None
    for end, start in zip(ends, starts[1:]):
        gap = ids[end:start]
        if not gap or gap[0] != separator or gap[-1] != separator:
            return None
        if len(gap) == 1:
            chains[-1] += 1
        else:
            chains.append(1)
    return chains


def _labelled(ids: list[int], places: Sequence[Tensor]) -> tuple[int, ...] | None:
    """Tiles of each picture; None where the prompt is not written as expected."""
    starts = [int(own[0]) for own in places]
    ends = [int(own[-1]) + 1 for own in places]
    whole = all(end - start == len(own) for start, end, own in zip(starts, ends, places))
    if not whole or ends[-1] == len(ids):
        return None
    separator = ids[ends[-1]]
    gaps = [ids[end:start] for end, start in zip([0, *ends], starts)]  # in front of each tile
    labels = [_label(gap, separator) for gap in gaps]
    if not all(labels):
        return None
    last = labels[-1]
    counts, count = [], 0
    for tile, label in enumerate(labels):
        count += 1
        behind = gaps[tile + 1] if tile + 1 < len(gaps) else [separator, separator]
        if label == last:
            if behind[0] != separator or behind.count(separator) < 2:  # its own, and that of the next picture's label
                return None
            counts.append(count)
            count = 0
        elif behind.count(separator) != 1 or behind.index(separator) > _ROW_END:
            return None
    return tuple(counts) if _alike(labels, counts) else None


def _label(gap: list[int], separator: int) -> tuple[int, ...]:
    """The ids behind the last separator of a gap; () if there are none, or too many."""
    for place in range(len(gap) - 1, max(-1, len(gap) - 2 - _LONGEST), -1):
        if gap[place] == separator:
            return tuple(gap[place + 1 :])
    return ()


def _alike(labels: Sequence[tuple[int, ...]], counts: Sequence[int]) -> bool:
    """Whether no label comes twice in a picture, and all pictures in tiles begin with the same."""
    first: set[tuple[int, ...]] = set()
    start = 0
    for count in counts:
        own = labels[start : start + count]
        start += count
        if len(set(own)) < count:
            return False
        if count > 1:
            first.add(own[0])
    return len(first) <= 1
