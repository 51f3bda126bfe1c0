"""The code of the guides runs as written, and what an installed package offers is found by its entry point."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from _families import batch_of, family
from _paths import ROOT

import tokenprune
from tokenprune import registry

GUIDES = ROOT / "docs" / "guides"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_methods_of_the_guide_work_on_every_kind_of_family(name):
    text = (GUIDES / "adding_a_method.md").read_text(encoding="utf-8")
    names: dict = {"__name__": "guide"}
    before = set(registry.METHODS.names())
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    try:
        for block in blocks:
            exec(compile(block, "adding_a_method.md", "exec", dont_inherit=True), names)
        added = sorted(set(registry.METHODS.names()) - before)
        assert len(added) == len(blocks) == 3
        for method in added:
            model, batch = family(name), batch_of(name, "ragged_left")
            if method == "cls_times_norm" and name != "llava":
                with pytest.raises(ValueError, match="needs a vision tower with a .CLS. token"):
                    tokenprune.apply(model, method, keep=5)
                continue
            with tokenprune.applied(model, method, keep=5) as handle, torch.no_grad():
                model(**batch)
                kept = [len(image) for prompt in handle.kept for image in prompt]
            assert kept and set(kept) == {5}
    finally:
        for method in set(registry.METHODS.names()) - before:
            registry.METHODS.unregister(method)


def test_paths_that_the_guides_name_are_there():
    root = GUIDES.parents[1]
    for guide in GUIDES.glob("adding_*.md"):
        for path in re.findall(r"`((?:tests|adapters|tokenprune|docs)/[a-z0-9_./]+\.(?:py|md))`", guide.read_text()):
            assert (root / path).is_file(), f"{guide.name} names {path}"


METHOD = """
from dataclasses import dataclass
from tokenprune.interfaces.pruner import Pruner
from tokenprune.registry import register_method

@register_method("from_outside")
@dataclass
class FromOutside(Pruner):
    def score(self, view):
        return view.features.float().sum(-1)
"""


def test_an_installed_package_offers_a_method(tmp_path, monkeypatch, capsys):
    from tokenprune.cli import main

    (tmp_path / "outsider_method.py").write_text(METHOD)
    info = tmp_path / "outsider-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outsider\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[tokenprune.methods]\nfrom_outside = outsider_method\nrandom = outsider_method\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._installed.cache_clear()
    try:
        main(["ls", "methods"])
        assert re.search(r"from_outside +from the installed module outsider_method", capsys.readouterr().out)
        assert "outsider_method" not in sys.modules, "listing imports nothing"
        assert registry.METHODS.get("random").__module__ == "tokenprune.methods.random", "a built-in wins"
        model = family("llava")
        with tokenprune.applied(model, "from_outside@3") as handle, torch.no_grad():
            model(**batch_of("llava", "one_left"))
            assert len(handle.kept[0][0]) == 3
    finally:
        registry.METHODS.unregister("from_outside")
        registry._installed.cache_clear()
