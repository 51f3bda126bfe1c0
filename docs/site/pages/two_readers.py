"""Markdown that reads well as a file of the repository and becomes more on the site.

Each of these stands between a comment that says what it is and `<!-- end -->`; read as a file, comments are invisible:

    <!-- file only -->   a sentence for who reads the file; the site leaves it out
    <!-- tabs -->        sections under `####` headings; the site puts them behind tabs
    <!-- buttons -->     links in a row; the site draws them as buttons, the first filled
"""

from __future__ import annotations

import re
import textwrap

BLOCK = re.compile(r"^<!-- (file only|tabs|buttons) -->\n(.*?)^<!-- end -->\n?", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\([^)]+\)")


def for_site(text: str) -> str:
    """The Markdown of a file as the site shows it."""
    return BLOCK.sub(
        lambda match: {"file only": _nothing, "tabs": _tabs, "buttons": _buttons}[match[1]](match[2]), text
    )


def _nothing(_: str) -> str:
    return ""


def _tabs(text: str) -> str:
    """Sections as tabs.

    Raises:
        ValueError: something stands before the first heading, and would belong to no tab.
    """
    before, *sections = re.split(r"^#### (.+)\n", text, flags=re.MULTILINE)
    if before.strip() or not sections:
        raise ValueError(f"Tabs begin with a heading `#### TITLE`, got {before.strip()[:60]!r}.")
    return "".join(
        f'=== "{title}"\n\n{textwrap.indent(body.strip(), "    ")}\n\n'
        for title, body in zip(sections[::2], sections[1::2], strict=True)
    )


def _buttons(text: str) -> str:
    kinds = iter([".md-button .md-button--primary"])
    return LINK.sub(lambda match: f"{match[0]}{{ {next(kinds, '.md-button')} }}", text)
