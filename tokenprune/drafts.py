"""What a draft proposed is no part of the prompt: how long the prompt of a `generate` call is.

Assisted decoding hands the model the prompt and the first proposed tokens in one call. A method that looks at the last
token, or at the instruction, must not take those for the prompt's, or its answer would depend on the draft.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from tokenprune.ledger import Ledger
from tokenprune.seams import cache_of

_NAMES = ("inputs", "input_ids", "inputs_embeds")


def _length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Tokens of the conversation when `generate` is called with these arguments; None if they do not say."""
    mask, cache = kwargs.get("attention_mask"), cache_of(kwargs)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.shape[1]  # it covers the cache too, where ids may be those of the new turn alone
    given = [args[0] if args else None, *(kwargs.get(name) for name in _NAMES)]
    lengths = [value.shape[1] for value in given if isinstance(value, Tensor) and value.dim() >= 2]
    longest, held = max(lengths, default=None), 0 if cache is None else cache.get_seq_length()
    return longest + held if longest is not None and longest <= held else longest


class Drafts:
    """Knows the length of the prompt while `generate` runs on one model."""

    def __init__(self) -> None:
        self._length: int | None = None

    def install(self, model: Any, ledger: Ledger) -> None:
        """Note the prompt of each `generate` call on this object; `ledger` takes that back."""
        generate = model.generate

        @functools.wraps(generate)
        def noting(*args: Any, **kwargs: Any) -> Any:
            before, self._length = self._length, _length(args, kwargs)
            try:
                return generate(*args, **kwargs)
            finally:
                self._length = before

        ledger.set(model, "generate", noting)

    def proposed(self, tokens: int) -> int:
        """How many of so many tokens, counted from the conversation's first, are not the prompt's."""
        return 0 if self._length is None else max(0, tokens - self._length)
