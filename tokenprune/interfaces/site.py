"""Sites, the places where tokens can leave, and the one reader of their texts.

"pixels" is before the vision tower, "vision:L" after block L of the tower, "input" after the projector and before the
decoder, "layer:K" where decoder layer K is entered. Blocks and layers count from 0.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

SITES = ("pixels", "vision:L", "input", "layer:K")
PLACES = tuple(site.partition(":")[0] for site in SITES)
"""Sites without their numbers, in the order in which they come."""
NUMBERED = tuple(site.partition(":")[0] for site in SITES if ":" in site)


class Site(NamedTuple):
    """A site, read.

    Attributes:
        place: "pixels", "vision", "input" or "layer".
        depth: L of "vision:L" or K of "layer:K"; None where the text has no number.
    """

    place: str
    depth: int | None


@lru_cache(maxsize=1024)
def read_site(text: str) -> Site:
    """A site from its text; "vision" and "layer" may come without a number, where a method knows the depths.

    Raises:
        ValueError: it is none; the message lists the sites.
    """
    place, colon, number = text.partition(":")
    plain = number.isascii() and number.isdigit()
    if place not in PLACES or (colon and (place not in NUMBERED or not plain)):
        raise ValueError(f"There is no site {text!r}; sites are {', '.join(SITES)}, with a number for L and K.")
    return Site(place, int(number) if colon else None)


def first_layer(text: str) -> int:
    """The decoder layer from which on a cut at a site is felt."""
    place, depth = read_site(text)
    return depth or 0 if place == "layer" else 0
