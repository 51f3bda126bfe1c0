"""The modules of docs/site that make pages, importable as mkdocs has them."""

from __future__ import annotations

import sys

import pytest
from _paths import ROOT


@pytest.fixture(autouse=True)
def makers(monkeypatch):
    """They are forgotten behind each test: `pages` is a name that others may use too."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("pages", "check_links", "hooks")]:
        del sys.modules[name]
