"""`tokenprune check-model` and what it is made of."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
from _tiny import prompts, tiny_llava
from _zoo_all import zoo_batch, zoo_model

from tokenprune.adapters._attention_calls import attention_in
from tokenprune.api import adapter_for
from tokenprune.cli import main
from tokenprune.interfaces.capability import CAPABILITIES
from tokenprune.model_check import capabilities_of, prompt_error


@pytest.mark.parametrize(
    ("name", "has"),
    [
        ("mistral3", (True, True, True, True, True)),
        ("idefics3", (True, True, True, True, True)),
        ("kimi_k25", (True, True, False, True, True)),
        ("step3p7", (True, True, False, False, False)),
    ],
)
def test_capabilities_are_those_of_the_table(name: str, has: tuple[bool, ...]) -> None:
    found = capabilities_of(adapter_for(zoo_model(name)), zoo_batch(name, pictures=[1]))
    assert tuple(finding.name for finding in found) == CAPABILITIES
    assert tuple(finding.has for finding in found) == has
    assert all(finding.says for finding in found)


def test_what_makes_latents_is_named() -> None:
    *_, signals, cuts = capabilities_of(adapter_for(zoo_model("idefics2")))
    assert not signals.has and not cuts.has
    assert signals.says.startswith("Idefics2Perceiver") and "look at all of a picture" in signals.says


def test_a_tower_whose_attention_is_not_what_is_read_has_no_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """check-model tries what the first picture would."""
    model = copy.deepcopy(zoo_model("paligemma"))
    attention = attention_in(adapter_for(model).vision.blocks[0])

    def flat(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
        return value.mean(dim=2, keepdim=True).expand_as(value).transpose(1, 2).contiguous(), None

    monkeypatch.setattr(sys.modules[type(attention).__module__], "eager_attention_forward", flat)
    attention.config._attn_implementation = "eager"
    *_, signals, _ = capabilities_of(adapter_for(model), zoo_batch("paligemma", pictures=[1]))
    assert not signals.has and "do not give what its attention computed" in signals.says


def test_layers_that_cannot_be_read_are_counted() -> None:
    (signals,) = [f for f in capabilities_of(adapter_for(zoo_model("exaone4_5"))) if f.name == "decoder signals"]
    assert signals.has and signals.says.startswith("3 of 4 layers read right; layer 3: ")


@pytest.mark.parametrize("name", ["llava", "mistral3", "qwen3_vl_moe", "gemma3_window", "lfm2_vl"])
def test_a_pruned_prompt_is_held_against_the_masked_model(name: str) -> None:
    if name == "llava":
        model, inputs = tiny_llava(), prompts([2])
    else:
        model, inputs = zoo_model(name), zoo_batch(name, pictures=[2])
    found = prompt_error(model, adapter_for(model), inputs, keep=4)
    assert 0 < found.kept < found.visual
    assert found.error < 1e-5 < 1e-3 < found.unpruned
    assert not any(layer._forward_pre_hooks for layer in adapter_for(model).layers)


def test_the_command_prints_five_lines_and_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-model", "pocket-llava", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("LlavaForConditionalGeneration, read by the family file 'llava'")
    assert [line[:16].strip() for line in lines[1:6]] == list(CAPABILITIES)
    assert all(line[17:20] == "yes" for line in lines[1:6])
    error, unpruned = (float(lines[6].partition(word)[2].split()[0].rstrip(")")) for word in ("are ", "unpruned: "))
    assert error < 1e-4 < unpruned
    assert main(["check-model", "no-such-model"]) == 2
    assert main(["check-model", "pocket-llava", "--side", "0"]) == 2


def test_a_model_without_a_processor_has_its_decoder_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llava().save_pretrained(tmp_path)
    assert main(["check-model", str(tmp_path), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in lines[1:6]] == list(CAPABILITIES)
    assert lines[6].startswith("a random prompt  not tried: ") and "save_pretrained" in lines[6]
