"""What a server takes: sizes, lengths, places where pictures may come from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """How much a request may ask for.

    Attributes:
        queue: requests that may wait while another is answered; one more gets HTTP 503.
        body: bytes of a request.
        pictures: pictures of a request.
        pixels: pixels of all pictures of a request together, as their files say before any is decoded.
        prompt_tokens: text and visual tokens of a prompt, before pruning.
        new_tokens: tokens of an answer; also what a request gets that does not say.
        seconds: for a body to arrive, for a picture to be fetched, and for a client to take the next piece of a stream.
        folder: pictures may be named as `file://` paths below it; None: they may not.
        hosts: pictures may be fetched over HTTP from these hosts; (): from none.
    """

    queue: int = 64
    body: int = 16 * MIB
    pictures: int = 16
    pixels: int = 40_000_000
    prompt_tokens: int = 16_384
    new_tokens: int = 1024
    seconds: float = 30.0
    folder: Path | None = None
    hosts: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise ValueError where a limit lets nothing through."""
        least = {"queue": 0, "body": 1, "pictures": 0, "pixels": 1, "prompt_tokens": 1, "new_tokens": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value < smallest:
                raise ValueError(f"The limit {name} must be at least {smallest}, got {value}.")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"The limit seconds must be a number above 0, got {self.seconds}.")
        for host in self.hosts:
            address = f"[{host}]" if host.count(":") > 1 else host  # of IPv6
            if not host or urlsplit(f"//{address}").hostname != host:
                raise ValueError(
                    "Pictures are fetched from hosts by their names alone, like pictures.example, in small letters and "
                    f"without a scheme or a port; got {host!r}."
                )
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"There is no folder {self.folder} to take pictures from.")
