"""Where things of the checkout stand, and under which path of the site."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"

MOVED = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files at the top of the checkout that are pages, and where."""


def site_path(repo: str) -> str:
    """Path inside the site of a file of the checkout, both with forward slashes.

    What stands in docs/ keeps its place; any other file that a page links to is put under `repository/`, so that the site
    needs neither a network nor the address of a repository. Text that is no Markdown gets `.txt`, so that browsers show it.
    """
    path = PurePosixPath(repo)
    if path.parts[0] == "docs":
        return str(PurePosixPath(*path.parts[1:]))
    if repo in MOVED:
        return MOVED[repo]
    shown = path.suffix in (".md", ".png", ".svg", ".csv", ".json")
    return f"repository/{path}" + ("" if shown else ".txt")


def relative(target: str, page: str) -> str:
    """`target` as it is written in a link on `page`, both paths inside the site."""
    here, there = PurePosixPath(page).parent.parts, PurePosixPath(target).parts
    shared = 0
    while shared < min(len(here), len(there) - 1) and here[shared] == there[shared]:
        shared += 1
    return "/".join([".."] * (len(here) - shared) + list(there[shared:]))
