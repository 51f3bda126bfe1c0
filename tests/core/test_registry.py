"""Names of methods and families: where they come from, and what is no name."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.cache_policy import CachePolicy
from tokenprune.interfaces.intervention import Intervention
from tokenprune.interfaces.pruner import Pruner
from tokenprune.registry import CACHE_POLICIES, INTERVENTIONS, METHODS, MODELS, Registry, UnknownName


def test_names_come_from_files_and_importing_them_is_lazy():
    assert {"random", "uniform", "pool", "downsample", "vtc_cls", "todre", "divprune", "holov", "oracle"} <= set(
        METHODS.names()
    )
    assert "llava" in MODELS.names() and "_base" not in MODELS.names()
    assert all(METHODS.describe(name) for name in METHODS.names())
    code = "import sys, tokenprune; tokenprune.list_methods(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("registry", [METHODS, INTERVENTIONS, CACHE_POLICIES, MODELS], ids=lambda one: one.kind)
def test_what_lists_say_of_a_name_is_a_whole_sentence(registry):
    """Lists, pages and tables show the first line of a file's docstring: a sentence that goes on would be cut."""
    said = {name: registry.describe(name) for name in registry.names() if registry.file_of(name)}
    assert said and {name: line for name, line in said.items() if not line.endswith(".")} == {}


def test_registry_refuses_bad_and_taken_names():
    registry = Registry("method", "tokenprune.methods")
    with pytest.raises(ValueError, match="lower snake case"):
        registry.register("Foo_")
    with pytest.raises(ValueError, match="taken by the built-in"):

        @registry.register("random")
        class Other:
            pass

    with pytest.raises(UnknownName, match="Did you mean 'random'"):
        registry.get("randm")

    @registry.register("mine")
    class Mine:
        """One line."""

    assert registry.get("mine") is Mine and registry.describe("mine") == "One line."
    Twin = type("Twin", (), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match="is taken by"):
        registry.register("mine")(Twin)


@pytest.mark.parametrize(
    ("registry", "base"),
    [(METHODS, Pruner), (INTERVENTIONS, Intervention), (CACHE_POLICIES, CachePolicy), (MODELS, Adapter)],
)
def test_a_registry_takes_only_what_derives_from_its_base_class(registry, base):
    before = registry.names()
    message = f"The {registry.kind} 'stranger' must be a class that derives from tokenprune.{base.__name__}, got "
    with pytest.raises(TypeError, match=re.escape(message) + ".*Stranger"):

        @registry.register("stranger")
        class Stranger:
            pass

    with pytest.raises(TypeError, match=re.escape(message) + "<function"):
        registry.register("stranger")(lambda view: view)
    assert registry.names() == before
    try:
        mine = registry.register("my_own")(type("MyOwn", (base,), {}))
        assert registry.get("my_own") is mine and mine.name == "my_own"
    finally:
        registry.unregister("my_own")
