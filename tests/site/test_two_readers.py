"""Pages of docs/ read well as files on a code host, and become tabs and buttons on the site."""

from __future__ import annotations

import re

import pytest
from _paths import ROOT

SITE_ONLY = re.compile(r"^(?:===|!!!|\?\?\?\+?) |\{ ?[.#:][\w-]|\A---\n", re.MULTILINE)
"""Tabs, admonitions, attribute lists and front matter: a code host shows them as they are typed."""
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)


def test_no_page_shows_markup_of_the_site_to_who_reads_the_file():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")]
    assert len(pages) > 30
    found = {str(page): SITE_ONLY.findall(CODE.sub("", page.read_text(encoding="utf-8"))) for page in pages}
    assert {name: marks for name, marks in found.items() if marks} == {}
    assert SITE_ONLY.findall('=== "Tab"\n[a](b){ .md-button }\n') and SITE_ONLY.findall("---\nhide: [toc]\n---\n")


def test_each_reader_gets_his_own():
    from pages.two_readers import for_site

    text = (
        "Both.\n\n<!-- file only -->\nGaps.\n<!-- end -->\n\n<!-- tabs -->\n#### One\n\n```\n1\n```\n\n#### Two\n\n2\n"
        "<!-- end -->\n\n<!-- buttons -->\n[a](a.md) [b](b.md#c)\n<!-- end -->\nEnd.\n"
    )
    shown = for_site(text)
    assert "Gaps" not in shown and "<!--" not in shown and shown.startswith("Both.") and shown.endswith("End.\n")
    assert '=== "One"\n\n    ```\n    1\n    ```\n\n=== "Two"\n\n    2\n' in shown
    assert "[a](a.md){ .md-button .md-button--primary } [b](b.md#c){ .md-button }" in shown
    with pytest.raises(ValueError, match="begin with a heading"):
        for_site("<!-- tabs -->\nlost\n\n#### One\n\n1\n<!-- end -->\n")


def test_a_table_keeps_the_indent_of_its_marker():
    """A table inside a list stands as deep as the list, or it is no part of it."""
    import hooks

    match = hooks.MARKER.search("1. point\n\n    <!-- site: slower -->\n")
    assert match and match.groups() == ("    ", "slower")


def test_every_page_that_asks_for_a_table_says_so_to_who_reads_the_file():
    for page in ROOT.glob("docs/**/*.md"):
        text = page.read_text(encoding="utf-8")
        assert "<!-- site: " not in text or "<!-- file only -->" in text, page.name
