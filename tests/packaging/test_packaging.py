"""The wheel, the import paths and the rules of the house.

Everything here reads the checkout, or a copy of what git tracks in it, and needs no network.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from _once import once

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
MAPPED = ("adapters", "kernels", "evals", "configs")
LIBRARY = ("tokenprune", *MAPPED)
MAX_LINES = 450

pytestmark = pytest.mark.packaging


def tracked() -> list[Path]:
    """Files of the checkout that git tracks, relative to its root; without git, all that is no cache."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        names = [Path(name) for name in done.stdout.split("\0") if name]
    else:
        names = [file.relative_to(ROOT) for folder in (*LIBRARY, "tests") for file in (ROOT / folder).rglob("*")]
        names += [file.relative_to(ROOT) for file in ROOT.iterdir()]
    return [name for name in names if (ROOT / name).is_file() and "__pycache__" not in name.parts]


def library(*folders: str) -> Iterator[Path]:
    """Tracked Python files under `folders`."""
    return (name for name in tracked() if name.suffix == ".py" and name.as_posix().startswith(tuple(folders)))


def tree(name: Path) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=str(name))


def module_name(name: Path) -> str:
    """adapters/llava.py -> tokenprune.adapters.llava"""
    parts = name.with_suffix("").parts
    parts = parts if parts[0] == "tokenprune" else ("tokenprune", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python(code: str, cwd: Path, path: Path | None = None) -> str:
    """Run `code` in a new interpreter in `cwd`, with `path` before site-packages; give back what it printed.

    An editable install of this checkout is put out of sight, or it would answer for whatever is missing.
    """
    hide = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", f"{hide}\n{code}"], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run(*arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def modules() -> list[str]:
    """Dotted names of everything in the library."""
    return [module_name(name) for name in library(*LIBRARY)]


def imported_by_users() -> list[Path]:
    """Files of the folders that users import from; those that vLLM alone imports, because they import it, are not."""
    return [name for name in library("tokenprune", "adapters", "kernels") if "vllm" not in at_once(name)]


def at_once(name: Path) -> set[str]:
    """Top-level names of what a file of `tokenprune/vllm` imports when it is imported, directly or not."""
    if "vllm" not in name.parts:
        return set()
    found: set[str] = set()
    for node in tree(name).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = ROOT / f"{node.module.replace('.', '/')}.py"
            inside = node.module.startswith("tokenprune.vllm.") and inner.is_file()
            found |= at_once(inner.relative_to(ROOT)) if inside else {node.module.split(".")[0]}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found


def one_of_each() -> list[str]:
    """One module for each of the folders that users import from, and the package itself."""
    chosen = {name.parent: module_name(name) for name in imported_by_users()}
    return ["tokenprune", *chosen.values()]


def strays(names: list[str], home: Path, cwd: Path, path: Path | None = None) -> dict[str, str | None]:
    """Modules that a new interpreter finds outside `home`, or not at all. Runs none of them but the packages."""
    code = f"import json; from importlib.util import find_spec as find; specs = {{n: find(n) for n in {names!r}}}"
    found = json.loads(python(f"{code}\nprint(json.dumps({{n: s and s.origin for n, s in specs.items()}}))", cwd, path))
    return {
        name: file for name, file in found.items() if not file or home.resolve() not in Path(file).resolve().parents
    }


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from an sdist, built from a copy of what git tracks: `build/` of the checkout plays no part."""
    pytest.importorskip("build")

    def build(out: Path) -> None:
        source = tmp_path_factory.mktemp("source")
        for name in tracked():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
        run("-m", "build", "--no-isolation", "--outdir", out, source)

    return next(once(tmp_path_factory, "dist", build).glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it, and nothing else."""

    def install(target: Path) -> None:
        run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)

    return once(tmp_path_factory, "site", install)


# The wheel


def test_wheel_has_one_top_level_package(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tokenprune"}
    assert len(tops) == 2


def test_wheel_holds_every_tracked_file_of_the_library_and_no_other(wheel: Path) -> None:
    here = {name for name in tracked() if name.parts[0] in LIBRARY and name.suffix not in (".md", "")}
    here |= {name for name in tracked() if name.parts[0] in LIBRARY and {"data", "models"} & set(name.parts[:-1])}
    expected = {(name if name.parts[0] == "tokenprune" else "tokenprune" / name).as_posix() for name in here}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("tokenprune/")}
    assert sorted(expected - packed) == [], "left out of the wheel; see [tool.setuptools] in pyproject.toml"
    assert sorted(packed - expected) == [], "in the wheel, and not tracked"
    assert "tokenprune/py.typed" in packed


def test_wheel_carries_its_licence(wheel: Path) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_wheel_says_who_it_is_and_leads_to_its_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    said = archive.read(f"{info}/METADATA").decode()
    assert "Name: tokenprune-vlm\n" in said and "License-Expression: Apache-2.0\n" in said
    assert "Description-Content-Type: text/markdown" in said and "## Install" in said
    assert "tokenprune = tokenprune.cli:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_sdist_holds_what_is_needed_to_test_it(wheel: Path) -> None:
    (sdist,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    folders = (*LIBRARY, "tests", "typings", ".ci")
    # what a folder says of itself is for readers of the repository; setuptools would put it into the wheel as well
    wanted = {name.as_posix() for name in tracked() if name.parts[0] in folders and name.name != "README.md"}
    wanted |= {name.as_posix() for name in tracked() if name.parts[0] == "docs" and name.suffix == ".md"}
    wanted |= {"Makefile", "CITATION.cff", "CHANGELOG.md", "LICENSE", "README.md", "Dockerfile", ".dockerignore"}
    wanted |= {"constraints.txt", "constraints-lowest.txt", "constraints-vllm.txt", "pyproject.toml"}
    assert sorted(wanted - packed) == [], "left out of the sdist; see MANIFEST.in"


def test_every_folder_of_modules_is_a_listed_package() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {".".join(name.parent.parts) for name in library(*LIBRARY)}
    needed = {folder if folder.split(".")[0] == "tokenprune" else f"tokenprune.{folder}" for folder in folders}
    assert sorted(needed - set(setup["packages"])) == [], (
        "setuptools leaves a folder that is not listed out of the wheel"
    )
    assert setup["package-dir"] == {"tokenprune": "tokenprune", **{f"tokenprune.{name}": name for name in MAPPED}}


# Import paths


def test_installed_wheel_imports_from_another_folder(installed: Path, tmp_path: Path) -> None:
    assert strays(modules(), installed, cwd=tmp_path, path=installed) == {}
    python("".join(f"import {name}\n" for name in one_of_each()), cwd=tmp_path, path=installed)


def test_installed_wheel_gives_way_inside_the_checkout(installed: Path) -> None:
    """Python puts the working directory first, so the checkout answers, and answers for all of its modules."""
    assert strays(modules(), ROOT, cwd=ROOT, path=installed) == {}


def test_bare_checkout_imports_from_elsewhere(tmp_path: Path) -> None:
    assert strays(modules(), ROOT, cwd=tmp_path, path=ROOT) == {}


def test_importing_the_package_loads_no_torch(tmp_path: Path) -> None:
    """What keeps `tokenprune --help` quick."""
    code = "import tokenprune; tokenprune.list_methods(); print('torch' in sys.modules)"
    assert python(code, cwd=tmp_path, path=ROOT) == "False"


def test_mapped_folders_are_no_packages_of_their_own() -> None:
    """A folder without __init__.py gives way to any real package of its name, wherever that stands on sys.path."""
    assert [folder for folder in MAPPED if (ROOT / folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("name", MAPPED)
def test_a_real_package_wins_over_our_folder_of_that_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    found = python(f"import {name}; print({name}.__file__)", cwd=ROOT, path=tmp_path)
    assert Path(found).resolve().parent == (tmp_path / name).resolve()


def test_transformers_finds_the_hugging_face_kernels_package_from_the_checkout() -> None:
    """With a kernels/__init__.py of ours this import dies. The version gate is held open, so that transformers does
    import from `kernels` whichever releases of the two meet here."""
    if not any(metadata.distributions(name="kernels")):  # asking by import would find a kernels/__init__.py of ours
        pytest.skip("the Hugging Face package `kernels` is not installed")
    code = """
import transformers.utils.import_utils as gate
gate.is_kernels_available = lambda *args, **options: True
import transformers.integrations.hub_kernels as hub
print(hub.LayerRepository.__module__)
"""
    assert python(code, cwd=ROOT).split(".")[0] == "kernels"


def test_import_changes_nothing_of_others() -> None:
    names = [module_name(name) for name in imported_by_users()]
    code = f"""
import importlib, os
import torch, torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def state():
    return {{
        "attention": dict(ALL_ATTENTION_FUNCTIONS.items()),
        "functional": dict(vars(F)),
        "tensor": dict(vars(torch.Tensor)),
        "environ": dict(os.environ),
        "torch": dict(enumerate([torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed()])),
    }}

import transformers.models.llava.modeling_llava
before = state()
for name in {names!r}:
    importlib.import_module(name)
after = state()
keys = [(part, key) for part in before for key in {{**before[part], **after[part]}}]
print([(part, key) for part, key in keys if before[part].get(key, "absent") != after[part].get(key, "absent")])
"""
    assert python(code, cwd=ROOT).splitlines()[-1] == "[]"


# Rules of the house


def imports(name: Path) -> set[str]:
    """Top-level names of all absolute imports in a file."""
    nodes = list(ast.walk(tree(name)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {full.split(".")[0] for full in names}


def test_methods_and_kernels_do_not_import_transformers() -> None:
    assert [str(name) for name in library("tokenprune/methods", "kernels") if "transformers" in imports(name)] == []


def test_library_code_raises_and_never_asserts() -> None:
    """`python -O` drops assert, and its message is none for a user."""
    found = [
        f"{name}:{node.lineno}"
        for name in library(*LIBRARY)
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def test_library_code_never_asks_for_full_attention_matrices() -> None:
    def asks(node: ast.AST) -> bool:
        if isinstance(node, ast.Call):
            return any(key.arg == "output_attentions" and is_true(key.value) for key in node.keywords)
        if isinstance(node, ast.Assign):
            names = [target.attr for target in node.targets if isinstance(target, ast.Attribute)]
            return "output_attentions" in names and is_true(node.value)
        return False

    def is_true(value: ast.AST) -> bool:
        return isinstance(value, ast.Constant) and value.value is True

    assert [str(name) for name in library(*LIBRARY) if any(asks(node) for node in ast.walk(tree(name)))] == []


def test_every_method_cites_its_paper_or_says_it_is_a_baseline() -> None:
    cite = re.compile(r"arxiv\.org/|doi\.org/|arxiv:\s*\d{4}\.\d{5}|\bbaseline\b", re.IGNORECASE)
    methods = [name for name in library("tokenprune/methods/") if not name.name.startswith("_")]
    assert [str(name) for name in methods if not cite.search(ast.get_docstring(tree(name)) or "")] == []


def test_files_stay_short() -> None:
    names = [name for name in tracked() if name.suffix == ".py"]
    lines = {str(name): len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in names}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}
