"""What is refused at the call because no part of the engine could do it right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _forward import forward
from _tiny import IMAGE, TEXT, prompts, tiny_llava

import tokenprune

ACTING = "var(channels=[1,2,3],tau=2.2,layers=[1,2],s_min=0,rho=0,p=0.9)"


@pytest.mark.parametrize("method", ["uniform@8", "fastv@8"])
def test_a_mask_that_hides_part_of_a_picture(method):
    batch = prompts([1, 1])
    batch["attention_mask"][1, (batch["input_ids"][1] == IMAGE).nonzero()[:3, 0]] = 0
    with pytest.raises(ValueError, match="hides 3 of the 36 visual tokens of a picture in row 1"):
        forward(tiny_llava(), batch, method)


def test_a_sliding_window_shorter_than_the_prompt_needs_masks_that_can_be_read():
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

    clip = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=42, patch_size=7
    )
    for window in (16, 4096):
        text = MistralConfig(**TEXT, sliding_window=window)
        config = LlavaConfig(vision_config=clip, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2)
        model = LlavaForConditionalGeneration(config).eval()
        if window == 4096:
            handle, _ = forward(model, prompts([1]), "fastv@8")
            assert len(handle.kept[0][0]) == 8
            continue
        forward(model, prompts([1]), "uniform@8")
        model.model.language_model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="see 16 tokens only.*'flash_attention_2', which counts what is left"):
            forward(model, prompts([1]), "uniform@8")


@pytest.mark.parametrize("reentrant", [False, True])
def test_attention_changed_under_gradient_checkpointing(reentrant):
    model, batch = tiny_llava(), prompts([1, 1])
    model.train()
    # transformers 5.23 has another name for it, and warns of the old one
    switch = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    switch({"use_reentrant": reentrant})
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    with tokenprune.applied(model, ACTING), pytest.raises(ValueError, match="Switch gradient checkpointing off"):
        model(**batch, labels=labels, use_cache=False)
    with tokenprune.applied(model, "vtc_cls@8"):
        model(**batch, labels=labels, use_cache=False).loss.backward()


def test_checkpoints_that_run_hooks_again_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases before 5.20 or so checkpoint a layer's call; today's checkpoint its forward."""
    from tokenprune.engine import guards

    class Older(torch.nn.Module):
        __module__ = "transformers.modeling_layers"

        def __call__(self, *args: Any) -> Any:
            return self.gradient_checkpointing and args

    model, batch = tiny_llava(), prompts([1])
    layer = type(model.model.language_model.layers[0])
    assert guards._runs_hooks_again(Older) and not guards._runs_hooks_again(torch.nn.Linear)
    monkeypatch.setattr(guards, "_runs_hooks_again", lambda cls: cls is layer)
    model.train()
    switch = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    switch({"use_reentrant": False})
    for method in ("fastv@8", "flowcut@8"):
        with tokenprune.applied(model, method), pytest.raises(ValueError, match="checkpointing runs a second time"):
            model(**batch, use_cache=False)
    with tokenprune.applied(model, "random@8"):
        model(**batch, use_cache=False)


@pytest.mark.parametrize("method", ["uniform@9", "downsample@9", "fastv@9"])
def test_a_prompt_without_tokens_fails_as_in_the_model_itself(method):
    model = tiny_llava()
    given = {
        "input_ids": torch.zeros(1, 0, dtype=torch.int64),
        "attention_mask": torch.ones(1, 0, dtype=torch.int64),
        "pixel_values": torch.zeros(0, 3, 42, 42),
    }
    with torch.no_grad():
        with pytest.raises(RuntimeError) as stock:
            model(**given)
        with tokenprune.applied(model, method), pytest.raises(RuntimeError) as pruned:
            model(**given)
    assert str(pruned.value) == str(stock.value)
