"""3-D positions (M-RoPE) of prompts whose pictures are cut: text stands where it would beside whole pictures, and kept
tokens keep their ids.

The ids of text are known when a request comes in. Those of kept tokens are known behind the tower, which vLLM runs once
for all prompts that show a picture: they travel behind its embeddings, counted from where the picture begins. Imports
no vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

CHANNELS = 6
"""Columns behind the embeddings: (time, row, column), each as a high and a low digit to base 256, exact in bf16."""
_BASE = 256
MOST_IDS = _BASE**2
"""Ids that two digits can say."""


def grid_positions(frames: int, rows: int, cols: int, step: float = 1.0) -> Tensor:
    """`[3, frames * rows * cols]` int64: ids of a visual's tokens, from where it begins; `step` ids between frames."""
    axes = [torch.arange(frames), torch.arange(rows), torch.arange(cols)]
    time, row, col = torch.meshgrid(*axes, indexing="ij")
    if step != 1.0:
        time = (time * step).long()
    return torch.stack([time, row, col]).flatten(1)


def pack(embeddings: Tensor, positions: Tensor) -> Tensor:
    """`[k, D]` and `[3, k]` to `[k, D + 6]`.

    Raises:
        ValueError: an id takes more than two digits.
    """
    if positions.numel() and int(positions.max()) >= MOST_IDS:
        raise ValueError(f"A visual token stands at {int(positions.max())}; ids go to {MOST_IDS - 1}.")
    digits = torch.cat([positions // _BASE, positions % _BASE]).T
    return torch.cat([embeddings, digits.to(embeddings)], dim=1)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """`[k, D]` and `[3, k]` int64 of what `pack` made."""
    high, low = packed[:, -CHANNELS:].T.round().long().chunk(2)
    return packed[:, :-CHANNELS], high * _BASE + low


def prompt_positions(length: int, visuals: Iterable[tuple[int, int, Tensor]]) -> tuple[Tensor, int]:
    """Ids `[3, S]` of a prompt, and how far the next token's are from S.

    Args:
        length: S.
        visuals: (where it begins, placeholders, `[3, N]` ids of its whole tokens from there), in order. At its
            placeholders stand ids that do not matter: `place_visuals` writes over them before they are used.
    """
    parts: list[Tensor] = []
    done = position = 0
    for offset, count, ids in visuals:
        parts.append(_text(offset - done, position))
        position += offset - done
        parts.append(ids[:, :count] + position)
        done, position = offset + count, position + int(ids.max()) + 1
    parts.append(_text(length - done, position))
    position += length - done
    return torch.cat(parts, dim=1), position - length


def check_strays(ids: Sequence[int], media: Iterable[int], ranges: Iterable[tuple[int, int]]) -> None:
    """Raise ValueError where a prompt has placeholders that no visual stands at, as a user's text may spell them:
    `place_visuals` would take them for a picture's.

    Args:
        ids: the prompt.
        media: ids of placeholders.
        ranges: (begin, end) of each visual.
    """
    known = {place for begin, end in ranges for place in range(begin, end)}
    if not known:
        return
    wanted = set(media)
    stray = next((place for place, one in enumerate(ids) if one in wanted and place not in known), None)
    if stray is not None:
        raise ValueError(
            f"The prompt has a placeholder of pictures or videos (id {ids[stray]}, at {stray}) that belongs to none of "
            "them. Leave it out of the text, or write it with a space inside."
        )


def _text(count: int, position: int) -> Tensor:
    return (torch.arange(count) + position).expand(3, -1)


def place_visuals(ids: Tensor, media: Sequence[int], positions: Tensor, own: Sequence[Tensor], computed: int) -> Tensor:
    """`positions` `[3, S]` with the ids of kept tokens in place.

    Args:
        ids: `[S]` the prompt.
        media: ids of placeholders.
        own: `[3, n]` each, from where its visual begins: of the next visual tokens from place `computed` on.
    """
    if not own:
        return positions
    device = positions.device
    is_media = torch.isin(ids.to(device), torch.tensor(list(media), device=device))
    every = torch.cat([one.to(device) for one in own], dim=1)
    places = is_media.nonzero()[:, 0]
    places = places[places >= computed][: every.shape[1]]
    # a visual begins behind the text before it, which the front end has seen to
    text = torch.where(is_media, 0, torch.arange(len(ids), device=device)).cummax(0).values[places]
    placed = positions.clone()
    placed[:, places] = (positions[:, text] + 1 + every).to(positions.dtype)
    return placed
