"""The files that name versions name the same ones."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tokenprune.seams import LOWEST, NEWEST

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.packaging


def test_the_versions_of_the_list_are_those_of_the_project():
    floors = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    support = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    for package in LOWEST:
        lowest, newest = (".".join(map(str, known[package])) for known in (LOWEST, NEWEST))
        assert any(re.fullmatch(rf"{package}>={lowest}(\.0)?", floor) for floor in floors)
        assert re.search(rf"^{package}=={newest}\.", constraints, re.MULTILINE)
        assert f"{package} {lowest} to {newest}" in readme
        for name, version in (("lowest", lowest), ("constraints", newest), ("newest", newest)):
            row = re.search(rf"^\| `{name}`.*$", support, re.MULTILINE)
            assert row and f"{package} {version}." in row[0], f"run the command of {name} in docs/support.md"


def test_the_lowest_versions_are_the_floors():
    from packaging.requirements import Requirement
    from packaging.version import Version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["dev"], *extras["pocket"]]
    floors = {one.name: Version(next(iter(one.specifier)).version) for one in map(Requirement, asked)}
    pins = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()[1:]
    pinned = {one.name: Version(next(iter(one.specifier)).version) for one in map(Requirement, pins)}
    assert {name: str(pinned.get(name)) for name, floor in floors.items() if pinned.get(name) != floor} == {}
