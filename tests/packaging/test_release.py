"""What goes out beside the code: citation, changelog, image, licences."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from _paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.packaging
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def licences():
    spec = importlib.util.spec_from_file_location("licences", ROOT / ".ci" / "licences.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows() -> dict[str, tuple[str, str, str]]:
    """(version, licence, needed by) of each package in docs/licences.md."""
    text = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    cells = [
        re.split(r" (?<!\\)\| ", line.strip("| \n")) for line in text.splitlines() if re.match(r"\| [a-z0-9]", line)
    ]
    return {name: (version, licence, users) for name, version, licence, users in cells if name != "package"}


def test_the_list_of_licences_is_that_of_the_constraints(licences):
    found = rows()
    assert {name: version for name, (version, _, _) in found.items()} == licences.pins(), (
        "write it anew: python .ci/licences.py > docs/licences.md"
    )
    # and says what the packages say that are here in the very version
    here = {dist.name.lower().replace("_", "-"): dist.version.split("+")[0] for dist in metadata.distributions()}
    same = [name for name, version in licences.pins().items() if here.get(name) == version]
    for name in same:
        assert found[name][1] == licences.licence_of(name).replace("|", "\\|"), name
    assert same or here.get("torch") != licences.pins()["torch"]


def test_nothing_that_every_install_brings_is_without_a_licence_or_binds_its_users():
    needed = {name: licence for name, (_, licence, users) in rows().items() if users == "every install"}
    assert {"torch", "transformers", "numpy", "pillow"} <= set(needed)
    for name, licence in needed.items():
        assert "not declared" not in licence and "not installed" not in licence, name
        assert not re.search(r"\bA?GPL", licence), f"{name}: {licence}"


def test_the_citation_is_that_of_the_project():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "type"} <= set(cited) and cited["type"] == "software"
    assert str(cited["version"]) == PROJECT["version"] and cited["license"] == PROJECT["license"]
    assert all({"name"} <= set(author) or {"family-names"} <= set(author) for author in cited["authors"])
    assert set(cited["keywords"]) <= set(PROJECT["keywords"])


def test_the_changelog_has_the_version_on_top():
    import tokenprune

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (unreleased|\d{4}-\d{2}-\d{2})$", text, re.MULTILINE)
    assert len(versions) == len(re.findall(r"^## ", text, re.MULTILINE)), "each heading is a version and its date"
    assert versions[0][0] == PROJECT["version"] == tokenprune.__version__
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_linter_has_nothing_to_say_of_the_image():
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("no hadolint here; the extra [dev] brings it on x86-64 Linux")
    done = subprocess.run([linter, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_copies_what_is_there_and_installs_what_is_pinned():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    allowed = set(re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE))
    for name in copied:
        assert (ROOT / name).exists() and name in allowed, name
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    assert set(setup.values()) <= set(copied), "every folder of the package"
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (big,) = re.findall(r"grep -E '\^\(([a-z|]+)\)=='", text)
    for name in big.split("|"):
        assert re.search(rf"^{name}==", pins, re.MULTILINE), name
    extras = {extra for each in re.findall(r"'\.\[([a-z,]+)\]'", text) for extra in each.split(",")}
    assert extras and extras <= set(PROJECT["optional-dependencies"])
    (version,) = re.findall(r"^FROM python:(\d+\.\d+)-slim$", text, re.MULTILINE)
    assert tuple(map(int, version.split("."))) >= (3, 10)
    assert re.search(r"^USER 1000$", text, re.MULTILINE), "nobody's code runs as root"
