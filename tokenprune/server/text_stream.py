"""From tokens to text, piece by piece: what was sent once never changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"  # what a tokenizer writes for the first bytes of a character


class TextSoFar:
    """The text of an answer while it grows.

    What may still change is held back: space at the end (an answer has none around it), the first bytes of a
    character, and what may be the beginning of a stop text.

    Args:
        decode: token ids to text.
        stops: the answer ends before the first of these.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, stops
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token; the text that is sure now and was not before."""
        self.tokens.append(token)
        return self._grow(last=False)

    def finish(self) -> str:
        """The rest, once no token follows."""
        return "" if self.stopped else self._grow(last=True)

    def _grow(self, last: bool) -> str:
        raw = self._decode(self.tokens)
        found = [place for place in (raw.find(stop) for stop in self._stops) if place >= 0]
        if found:
            raw, self.stopped = raw[: min(found)], True
        elif not last:
            raw = raw.rstrip(_UNFINISHED)
            raw = raw[: len(raw) - self._open(raw)]
        text = raw.strip()
        # a tokenizer that takes back what it wrote: wait until it agrees again
        new = text[len(self.text) :] if text.startswith(self.text) else ""
        self.text += new
        return new

    def _open(self, text: str) -> int:
        """How many letters at the end may be the beginning of a stop text."""
        lengths = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(lengths, default=0)
