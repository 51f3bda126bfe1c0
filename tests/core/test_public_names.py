"""The names that users import are one list, and `import tokenprune` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import tokenprune


@pytest.mark.parametrize("name", sorted(tokenprune._public))
def test_a_public_name_is_the_object_of_its_module(name):
    assert getattr(tokenprune, name) is getattr(import_module(tokenprune._public[name]), name)


def test_all_is_the_sorted_list_of_public_names():
    assert list(tokenprune.__all__) == sorted({*tokenprune._public, "__version__"}) == dir(tokenprune)
    names: dict = {}
    exec("from tokenprune import *", names)
    assert set(tokenprune.__all__) <= set(names)


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="has no attribute 'Prunner'"):
        tokenprune.Prunner  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(tokenprune.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(block.body)
    assert {alias.asname or alias.name: node.module for node in imports for alias in node.names} == tokenprune._public


def test_import_and_help_load_no_torch():
    code = (
        "import sys, tokenprune; from tokenprune import register_method, register_model; dir(tokenprune); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    code = (
        "import sys\nfrom tokenprune.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
