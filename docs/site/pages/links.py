"""Links of Markdown files, from places in the checkout to places in the site."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import PurePosixPath

from pages.places import ROOT, relative, site_path

LINK = re.compile(r"(\]\()([^)\s#]*)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """`text` with `change` applied to all of it that is no code."""
    parts = FENCE.split(text)
    return "".join(part if number % 2 else change(part) for number, part in enumerate(parts))


def repo_target(link: str, repo: str) -> str | None:
    """What a link on the file `repo` of the checkout points to, as a path in the checkout; None for a web address."""
    if not link or ":" in link:
        return None
    return posixpath.normpath(str(PurePosixPath(repo).parent / link))


def moved_links(text: str, repo: str, page: str) -> str:
    """The Markdown of the file `repo` with its relative links rewritten for the page `page` of the site."""

    def one(match: re.Match[str]) -> str:
        target = repo_target(match[2], repo)
        if target is None or target.startswith("..") or not (ROOT / target).is_file():
            return match[0]
        return f"{match[1]}{relative(site_path(target), page)}{match[3]}"

    return outside_code(text, lambda part: LINK.sub(one, part))


def linked_outside(text: str, repo: str) -> set[str]:
    """Files of the checkout outside docs/ that the Markdown of `repo` links to."""
    found: set[str] = set()

    def look(part: str) -> str:
        for match in LINK.finditer(part):
            target = repo_target(match[2], repo)
            if target and not target.startswith(("..", "docs/")) and (ROOT / target).is_file():
                found.add(target)
        return part

    outside_code(text, look)
    return found
