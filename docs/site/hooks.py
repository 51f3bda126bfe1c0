"""What mkdocs runs while it builds the site: pages are made, links to other files rewritten, tables put in.

A line `<!-- site: NAME -->` in a page of docs/ is replaced by the table NAME of `pages/choosing.py` or
`pages/benches.py`, or, with NAME `readme RESULTS`, by what stands between the markers of that name in README.md. Read
on GitHub the line is invisible.
"""

from __future__ import annotations

import re
from functools import cache
from textwrap import indent
from typing import Any

from mkdocs.structure.files import File, Files
from pages import api, benches, boards, choosing, families, interventions, methods
from pages.links import linked_outside, moved_links
from pages.places import DOCS, MOVED, ROOT, relative, site_path
from pages.two_readers import for_site

MARKER = re.compile(r"^( *)<!-- site: (.+?) -->$", re.MULTILINE)
UNSEARCHED = ("leaderboards/pocket", "repository/")
"""Pages that the search leaves out: their tables hold every word many times."""
TABLES = {**choosing.TABLES, **benches.TABLES}
_origin: dict[str, str] = {}
"""By path of a page in the site the file of the checkout that it is, where links are to be rewritten."""
BOARDS = {f"leaderboards/{board.file}.md": board for board in boards.BOARDS}


def on_config(config: Any) -> Any:
    """Entries such as `methods/*` of the navigation become the pages made, `guides/*` and `*` written ones of that
    folder that are named nowhere: who adds a guide need not touch the menu."""
    made = generated()
    named = set(re.findall(r"[\w/]+\.md", str(config["nav"])))
    for section in config["nav"]:
        for title, entries in section.items():
            if isinstance(entries, list):
                section[title] = [page for entry in entries for page in _expanded(entry, made, named)]
    return config


def _expanded(entry: Any, made: dict[str, str], named: set[str]) -> list[Any]:
    if not (isinstance(entry, str) and entry.endswith("*")):
        return [entry]
    pages = [path for path in made if path.startswith(entry[:-1]) and "/" in path]
    if not pages or entry == "*":  # written ones: their own headings are their titles
        files = sorted((DOCS / entry).parent.glob("*.md"))
        return [path for path in (file.relative_to(DOCS).as_posix() for file in files) if path not in named]
    index = [path for path in pages if path.endswith("/index.md")]
    return index + [{_stem(path): path} for path in pages if path not in index]


def _stem(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".md")


@cache
def generated() -> dict[str, str]:
    """Every page that is made, by its path in the site."""
    return {**methods.pages(), **interventions.pages(), **families.pages(), **api.pages()}


def on_files(files: Files, config: Any) -> Files:
    """The pages that are made join, and every file of the checkout that a page links to."""
    _origin.clear()
    for file in files:
        if (DOCS / file.src_uri).is_file():
            _origin[file.src_uri] = f"docs/{file.src_uri}"
    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))
    waiting = set(MOVED)
    for path, repo in list(_origin.items()):
        if path.endswith(".md"):
            waiting |= linked_outside((ROOT / repo).read_text(encoding="utf-8"), repo)
    done: set[str] = set()
    while waiting - done:
        repo = min(waiting - done)
        done.add(repo)
        content = (ROOT / repo).read_bytes()
        files.append(File.generated(config, site_path(repo), content=content))
        _origin[site_path(repo)] = repo
        if repo.endswith(".md"):
            waiting |= linked_outside(content.decode("utf-8"), repo)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links are those of the site, and markers become tables."""
    if page.file.src_uri.startswith(UNSEARCHED):
        page.meta["search"] = {"exclude": True}
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation", "toc"]
    if page.file.src_uri in BOARDS:  # as a file it is headed by the name of its sweep
        markdown = re.sub(r"\A# .*", f"# Leaderboard of {BOARDS[page.file.src_uri].title}", markdown)
    repo = _origin.get(page.file.src_uri)
    if repo is None:
        return markdown
    markdown = moved_links(for_site(markdown), repo, page.file.src_uri)
    return MARKER.sub(lambda match: indent(_table(match[2], page.file.src_uri), match[1]), markdown)


def _table(name: str, page: str) -> str:
    """The table that a marker asks for, with links as they are written on `page`.

    Raises:
        ValueError: there is no such table.
    """
    if name.startswith("readme "):
        wanted = name.removeprefix("readme ")
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        found = re.search(rf"<!-- {wanted}:begin -->\n(.*?)<!-- {wanted}:end -->", text, re.DOTALL)
        if found is None:
            raise ValueError(f"README.md has no lines <!-- {wanted}:begin --> and <!-- {wanted}:end -->.")
        return moved_links(found[1], "README.md", page)
    if name not in TABLES:
        raise ValueError(f"{page} asks for a table {name!r}, and there are {', '.join(TABLES)}.")
    return re.sub(
        r"\]\(((?:methods|leaderboards|bench)/[^)]+)\)", lambda match: f"]({relative(match[1], page)})", TABLES[name]()
    )
