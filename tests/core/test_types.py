"""What type checkers know: names and options of methods, so that a misspelling is found before anything runs."""

from __future__ import annotations

import importlib.util
import json
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest
from _paths import ROOT

import tokenprune
from tokenprune.registry import INTERVENTIONS, METHODS

RIGHT = """
from pathlib import Path
import tokenprune
from tokenprune import MethodName, Pruner
from tokenprune.methods import FastV, HoloV

class Mine(Pruner):
    power: float = 2.0

def right(model: object) -> None:
    handle = tokenprune.apply(model, "holov", keep=128, variant="paper")
    handle.report()
    tokenprune.apply(model, "holov@64")
    tokenprune.apply(model, "vtc_cls@64+var")
    tokenprune.apply(model, "tuned.yaml")
    tokenprune.apply(model, Path("tuned.yaml"), keep=64)
    tokenprune.apply(model, "fastv", average=320)
    tokenprune.apply(model, "var", p=0.4)
    tokenprune.apply(model, {"method": "todre", "keep": 64, "objective": "k_center"})
    tokenprune.apply(model, ["vtc_cls@128", "var"])
    tokenprune.apply(model, HoloV(variant="official"), keep=64)
    tokenprune.apply(model, MethodName("feature_norm"), keep=64, power=1.0)
    tokenprune.apply(model, Mine(), keep=64)
    for name in tokenprune.list_methods():
        tokenprune.apply(model, name, keep=64)
    with tokenprune.applied(model, "vtc_cls", keep=0.25, positions="keep") as handle:
        print(handle.kept)
    print(FastV(layer=2))
"""
WRONG = {
    'tokenprune.apply(model, "hollov", keep=64)': "",
    'tokenprune.apply(model, "holov", keep=64, varant="paper")': "",
    'tokenprune.apply(model, "holov", keep=64, variant="papper")': "",
    'tokenprune.applied(model, "fastv", keep=64, layer="two")': "",
    'tokenprune.apply(model, "var", keep=64)': "",
    'tokenprune.apply(model, "holov", keep=64, outputs="ful")': "",
    'HoloV(varant="paper")': "varant",
    "tokenprune.methods.HolloV()": "HolloV",
}
HEAD = """
import tokenprune
import tokenprune.methods
from tokenprune.methods import HoloV

def wrong(model: object) -> None:
"""


@pytest.fixture(scope="module")
def stubs():
    spec = importlib.util.spec_from_file_location("type_stubs", ROOT / ".ci" / "type_stubs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_stubs_are_those_of_today(stubs):
    for file, text in stubs.stubs().items():
        assert file.read_text(encoding="utf-8") == text, f"write {file.name} anew: python .ci/type_stubs.py"
    text = stubs.calls_stub()
    for name in [*stubs.built_in(METHODS), *stubs.built_in(INTERVENTIONS)]:
        assert text.count(f'Literal["{name}"]') == 2, name


@pytest.mark.slow
def test_pyright_flags_a_misspelling_and_nothing_that_works(tmp_path):
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(HEAD + "".join(f"    {line}\n" for line in WRONG))
    settings = {"extraPaths": [str(ROOT)], "stubPath": str(ROOT / "typings"), "pythonVersion": "3.10"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = [each for each in found if each["severity"] == "error"]
    said = [each["message"] for each in errors if each["file"].endswith("right.py")]
    assert said == [], "what works is no error"
    first = HEAD.count("\n")
    by_line = {each["range"]["start"]["line"]: each["message"] for each in errors if each["file"].endswith("wrong.py")}
    for number, (line, names) in enumerate(WRONG.items()):
        assert number + first in by_line, f"{line} is not flagged"
        assert names in by_line[number + first], by_line[number + first]
    assert len(by_line) == len(WRONG)


@pytest.mark.parametrize(("registry", "package"), [(METHODS, "methods"), (INTERVENTIONS, "interventions")])
def test_packages_export_their_classes(registry, package):
    module = importlib.import_module(f"tokenprune.{package}")
    for name in registry.names():
        if registry.file_of(name):
            assert getattr(module, registry.class_name(name)) is registry.get(name)
    with pytest.raises(
        AttributeError, match="has no attribute 'HolloV'" + (".*'HoloV'" if package == "methods" else "")
    ):
        module.HolloV  # noqa: B018


def test_help_shows_the_package_and_nothing_beside_it():
    """A checkout has the package inside a folder that is on its path."""
    text = pydoc.plain(pydoc.render_doc(tokenprune))
    contents = text.partition("PACKAGE CONTENTS")[2].partition("\n\n")[0].split()
    names = [line for line in contents if not line.startswith("(")]
    assert "tokenprune" not in names and "tests" not in names
    assert {"adapters", "evals", "kernels", "configs", "methods", "api"} <= set(names) and len(names) == len(set(names))
    assert "tokenprune.tokenprune" not in text
    code = "import tokenprune.evals.errors\ntry:\n    import tokenprune.tests\nexcept ImportError:\n    print('no')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "no", done.stderr
    assert all(Path(place) == Path(place).resolve() for place in tokenprune.__path__), "no detours in messages"
