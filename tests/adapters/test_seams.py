"""What we use of transformers and torch is where the list says, and what is not is named in one sentence."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from _families import BUILDERS, family
from _paths import ROOT
from _tiny import tiny_llava

import tokenprune
from tokenprune import seams
from tokenprune.seams import EVALUATION_SEAMS, SEAMS, moved, too_old

OTHER_DECODERS = {f"{name}{part}" for name in ("Mistral", "Qwen3") for part in ("Model", "DecoderLayer", "Attention")}
"""Of checkpoints that no tiny model stands for."""


@pytest.fixture(autouse=True)
def asked_anew():
    """Each seam is asked once a process; here the answers change."""
    seams._lost.cache_clear()
    yield
    seams._lost.cache_clear()


def test_the_installed_releases_have_every_seam():
    assert moved(SEAMS) == ""
    assert moved(EVALUATION_SEAMS) == ""
    assert too_old() == ""


def test_what_the_list_says_of_classes_is_so_in_models():
    """The check has no model and goes by what a class mentions; here models are asked for what they really have."""
    asked = set()
    for name in BUILDERS:
        for module in family(name).modules():
            for seam in SEAMS:
                if seam.where == f"{type(module).__module__}:{type(module).__qualname__}":
                    asked.add(seam.where)
                    for names in seam.what:
                        assert any(hasattr(module, one) for one in names.split("|")), (seam.where, names)
    modeled = [seam.where for seam in SEAMS if seam.where.startswith("transformers.models.") and seam.what]
    names = {where.rpartition(":")[2] for where in modeled if where not in asked}
    assert {name for name in names if name[0].isupper() and "." not in name} <= OTHER_DECODERS


def refusal() -> str:
    """What `apply` says, having changed nothing."""
    model = tiny_llava()
    before = [(module, dict(vars(module))) for module in model.modules()]
    with pytest.raises(ImportError) as caught:
        tokenprune.apply(model, "random@9")
    assert all(vars(module) == state for module, state in before)
    return str(caught.value)


def test_a_method_that_moved_is_named(monkeypatch):
    from transformers.cache_utils import Cache

    monkeypatch.delattr(Cache, "batch_select_indices")
    version = seams._installed("transformers")
    assert refusal() == (
        f"transformers {version} has no longer transformers.cache_utils.Cache.batch_select_indices (which the "
        "bookkeeping of a pruned cache needs): install a release that tokenprune was tested with, pip install "
        "'transformers>=5.17,<5.25'."
    )


def test_an_argument_that_moved_is_named(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    def forward(self, hidden_states, attention_mask, position_ids, cache, rotations):
        raise NotImplementedError

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    said = refusal()
    assert "no longer the argument 'position_embeddings' of LlamaDecoderLayer.forward (which a cut inside" in said
    assert said.count(". ") == 0, "one sentence"


def test_an_attribute_that_moved_is_named_and_others_with_it(monkeypatch):
    from torch import nn
    from transformers.models.llama import modeling_llama

    class LlamaAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.head_dim, self.qkv_proj = None, 1, None

    LlamaAttention.__module__ = modeling_llama.__name__
    monkeypatch.setattr(modeling_llama, "LlamaAttention", LlamaAttention)
    found = moved(SEAMS)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert f"the attribute '{name}' of LlamaAttention" in found
    assert found.count("; nor ") == 2


def test_a_seam_of_a_family_that_a_model_is_not_made_of_refuses_nothing(monkeypatch):
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

    monkeypatch.delattr(SmolVLMConnector, "pixel_shuffle")
    assert "SmolVLMConnector.pixel_shuffle" in moved(SEAMS)
    tokenprune.apply(tiny_llava(), "random@9").remove()


@pytest.mark.parametrize(
    ("package", "installed", "said"),
    [
        ("transformers", "5.16.1", "needs transformers 5.17 or newer, and 5.16.1 is installed: pip install -U"),
        ("torch", "2.10.0+cu128", "needs torch 2.11 or newer, and 2.10.0+cu128 is installed: pip install -U"),
    ],
)
def test_a_release_that_is_too_old_is_refused(monkeypatch, package, installed, said):
    version = seams._installed
    monkeypatch.setattr(seams, "_installed", lambda name: installed if name == package else version(name))
    assert said in refusal()


@pytest.mark.parametrize("installed", ["5.99.0", "6.0.0.dev0"])
def test_a_newer_release_that_has_all_is_taken(monkeypatch, installed):
    monkeypatch.setattr(seams, "_installed", lambda name: installed)
    tokenprune.apply(tiny_llava(), "random@9").remove()


def test_the_cheap_part_loads_no_model_code():
    code = (
        "import sys; sys.path.insert(0, 'tests'); from _tiny import tiny_llava; import tokenprune\n"
        "model = tiny_llava()\n"
        "before = set(sys.modules); tokenprune.apply(model, 'random@9').remove()\n"
        "print([name for name in set(sys.modules) - before if name.startswith('transformers.models.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def imported() -> set[str]:
    """`module:name` of all that the library imports of transformers; the pocket models' recipes are left out, which are
    run by hand."""
    found = set()
    for folder in ("tokenprune", "adapters", "evals"):
        for file in (ROOT / folder).rglob("*.py"):
            if {"pocket", "pocket_training"} & set(file.parts) or file.name == "seams.py":
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                    found |= {f"{node.module}:{alias.name}" for alias in node.names}
    return found


def test_whatever_is_imported_of_transformers_is_on_the_list():
    listed = {place for seam in SEAMS + EVALUATION_SEAMS for place in seam.where.split("|")}
    # a submodule may be imported by name, and something of it be listed
    listed |= {place.replace(":", ".") for place in listed}
    left = {
        name
        for name in imported()
        if not any(re.match(re.escape(name) + r"($|\.)", place) for place in listed)
        and not any(place.startswith(name.replace(":", ".") + ":") for place in listed)
    }
    assert left == set()
