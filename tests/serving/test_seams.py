"""Seams of vLLM, and releases and engines that do not fit."""

from __future__ import annotations

import pytest
from _vllm import needs_vllm

needs_vllm()

import vllm  # noqa: E402

from tokenprune.seams import Seam  # noqa: E402
from tokenprune.vllm import plugin, seams  # noqa: E402


@pytest.mark.parametrize("seam", seams.SEAMS, ids=lambda seam: seam.where)
def test_the_installed_release_has_the_seam(seam):
    assert seam.missing() == []


def test_the_installed_release_fits():
    assert seams.check_release() == ""


@pytest.mark.parametrize("version, fits", [("0.31.1", False), ("0.32.7", True), ("0.33.0", False), ("1.0", False)])
def test_other_releases_are_refused_with_a_sentence(monkeypatch, version, fits):
    monkeypatch.setattr(vllm, "__version__", version)
    said = seams.check_release.__wrapped__()
    assert (said == "") == fits
    assert fits or (version in said and "pip install 'vllm>=0.32,<0.33'" in said)


def test_a_seam_that_is_gone_is_named(monkeypatch):
    gone = Seam("vllm.model_executor.models.llava:LlavaForConditionalGeneration._cut", "LLaVA")
    monkeypatch.setattr(seams, "SEAMS", (gone,))
    assert "LlavaForConditionalGeneration._cut (which LLaVA needs)" in seams.check_release.__wrapped__()


class Config:
    """As much of vLLM's model config as is asked before a processor is made."""

    def __init__(self, name, setting):
        self.architectures = [name]
        self.multimodal_config = self
        self.mm_processor_kwargs = setting


@pytest.mark.parametrize("wrong", ["", "this release does not fit."])
def test_a_setting_that_nothing_would_act_on_is_refused(monkeypatch, wrong):
    from vllm.multimodal.registry import MultiModalRegistry

    monkeypatch.setattr(MultiModalRegistry, "create_processor", lambda self, model_config: "made")
    plugin._refuse_others(wrong)
    registry = MultiModalRegistry()
    assert registry.create_processor(Config("Idefics3ForConditionalGeneration", None)) == "made"
    with pytest.raises(ValueError, match="does not cover|does not fit"):
        registry.create_processor(Config("Idefics3ForConditionalGeneration", {"tokenprune": "divprune@64"}))
    if not wrong:
        ours = Config("LlavaForConditionalGeneration", {"tokenprune": "divprune@64"})
        assert registry.create_processor(ours) == "made"


def test_every_other_class_of_pictures_is_refused(monkeypatch, record_property):
    from vllm.model_executor.models.registry import _MULTIMODAL_MODELS
    from vllm.multimodal.registry import MultiModalRegistry

    monkeypatch.setattr(MultiModalRegistry, "create_processor", lambda self, model_config: "made")
    plugin._refuse_others("")
    others = sorted(set(_MULTIMODAL_MODELS) - set(plugin.MODELS))
    for name in others:
        with pytest.raises(ValueError, match=f"tokenprune was given for {name}, which it does not cover inside vLLM"):
            MultiModalRegistry().create_processor(Config(name, {"tokenprune": "divprune@64"}))
    record_property("refused", str(len(others)))


def test_what_is_covered_is_said_twice_alike():
    from tokenprune.vllm.families import FAMILIES

    assert set(plugin.MODELS) == set(FAMILIES)


def test_what_is_registered_is_a_subclass_of_vllms_own():
    from importlib import import_module

    from vllm.model_executor.models.registry import _MULTIMODAL_MODELS

    for name, where in plugin.MODELS.items():
        module, _, ours = where.partition(":")
        stock_module, stock = _MULTIMODAL_MODELS[name]
        parent = getattr(import_module(f"vllm.model_executor.models.{stock_module}"), stock)
        assert issubclass(getattr(import_module(module), ours), parent)


def test_a_setting_of_nothing_changes_no_engine():
    from vllm.config.multimodal import MultiModalConfig

    plugin._positions_come_with_embeddings()
    for setting in (None, {}, {"tokenprune": None}):
        assert not MultiModalConfig(mm_processor_kwargs=setting).is_multimodal_pruning_enabled(), setting
    assert MultiModalConfig(mm_processor_kwargs={"tokenprune": "divprune@64"}).is_multimodal_pruning_enabled()
