"""Hidden states behind a decoder's final norm, and how visual tokens compare there with tokens of the text (DART)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize


@torch.no_grad()
def final_states(decoder: Any, hidden: Tensor) -> Tensor:
    """What the norm behind the last layer makes of hidden states `[..., D]`, in fp32.

    Raises:
        ValueError: the decoder has none where it is looked for.
    """
    norm = getattr(decoder, "norm", None)
    if norm is None:
        raise ValueError(
            f"The decoder {type(decoder).__name__} has no norm at `norm`, where Llama and its relatives have the one "
            "behind their last layer, so methods that compare tokens behind it (dart) cannot run on it. Use another "
            "method."
        )
    return norm(hidden.detach()).float()


class TextPivots:
    """The text tokens of each prompt of a batch that visual tokens are compared with.

    Args:
        decoder: has the norm.
        hidden: `[B, P, D]`.
        norms: `[B, P]` fp32, what ranks the text.
        ends: `[B, 1]` int64, the last token of each prompt.
        texts: how many tokens of text stand behind each prompt's last visual token.
        count: how many are taken.
    """

    @torch.no_grad()
    def __init__(
        self, decoder: Any, hidden: Tensor, norms: Tensor, ends: Tensor, texts: Sequence[int], count: int
    ) -> None:
        self._decoder, self._hidden = decoder, hidden
        lengths = torch.tensor([max(text, 1) for text in texts], device=ends.device)[:, None]  # [B, 1]
        at = torch.arange(max(max(texts), 1), device=ends.device)[None]  # [1, T], from the first token of the text on
        places = (ends - lengths + 1 + at).clamp(max=norms.shape[1] - 1)  # [B, T]
        ranked = norms.gather(1, places).masked_fill(at >= lengths, -torch.inf)
        order = ranked.argsort(dim=1, descending=True, stable=True)  # [B, T]
        turn = torch.arange(count, device=ends.device)[None] % lengths  # [B, P]
        self.places = places.gather(1, order.gather(1, turn))
        """`[B, P]` int64, where they stand."""

    @torch.no_grad()
    def cosine(self, sample: int, places: Tensor) -> Tensor:
        """`[n, P]` fp32, of the tokens at `places` `[n]` of a row."""
        row, both = self._hidden[sample], (places, self.places[sample])
        tokens, pivots = (normalize(final_states(self._decoder, row[at]), dim=-1) for at in both)
        # one pivot at a time, so that equal tokens get equal numbers whatever stands beside them
        return torch.stack([(tokens * pivot).sum(dim=-1) for pivot in pivots.unbind(0)], dim=-1)
