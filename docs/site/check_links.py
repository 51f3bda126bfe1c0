"""Every link of the built site: `python docs/site/check_links.py site`.

A link inside the site must lead to a file that is there, and its anchor to an element of that file. Links to the web
are looked at for their form only, so that nothing here needs a network. Pages must ask for nothing from elsewhere while
they load: no script, style, font or picture by a web address.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "source": "src", "iframe": "src"}
LINKED_RELS = {"stylesheet", "icon", "preload", "prefetch", "modulepreload", "preconnect", "manifest"}


class Page(HTMLParser):
    """The links, anchors and loaded files of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        for name in ("id", "name") if tag == "a" else ("id",):
            if found.get(name):
                self.anchors.add(str(found[name]))
        if tag == "a" and found.get("href") is not None:
            self.links.append(str(found["href"]))
        if tag in LOADED and found.get(LOADED[tag]):
            self.loaded.append(str(found[LOADED[tag]]))
        if tag == "link" and set((found.get("rel") or "").split()) & LINKED_RELS:
            self.loaded.append(str(found.get("href")))


def complaints(site: Path) -> Iterator[str]:
    """A sentence for each link that leads nowhere."""
    site = site.resolve()
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site} holds no page; build it first."
    for file, page in pages.items():
        name = file.relative_to(site)
        for link in page.loaded:
            if urlsplit(link).scheme in ("http", "https") or link.startswith("//"):
                yield f"{name} loads {link} from the web while it opens."
        # the page for addresses that are not there is served from any depth, so its links are from the top
        for link in page.links + page.loaded if name.name != "404.html" else ():
            said = _complaint(link, file, site, pages)
            if said:
                yield f"{name}: {said}"


def _complaint(link: str, file: Path, site: Path, pages: dict[Path, Page]) -> str:
    parts = urlsplit(link)
    if parts.scheme in ("http", "https"):
        fit = parts.hostname and "." in parts.hostname and not set(link) & set(" <>\"'`")
        return "" if fit else f"the address {link!r} has no host or odd characters."
    if parts.scheme in ("data", "mailto", "javascript"):
        return ""
    if parts.scheme or link.startswith("/"):
        return f"the link {link!r} works from one place only; write it from the page on."
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if target.is_dir():
        target /= "index.html"
    if site not in target.parents or not target.is_file():
        return f"the link {link!r} leads to no file of the site."
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors and anchor != "__tabbed":
        return f"the link {link!r} leads to a page without that anchor."
    return ""


def main() -> int:
    """Print what is wrong; 1 where anything is."""
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "site")
    found = list(complaints(site))
    print("\n".join(found) or f"Every link of {site} leads somewhere, and no page loads anything from the web.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
