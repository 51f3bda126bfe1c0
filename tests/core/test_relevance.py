"""The hint of CDPruner from a CLIP model: against its formula, step by step, on a tiny CLIPModel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _tiny import prompts, tiny_llava
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

import tokenprune
from tokenprune.relevance import clip_relevance

END, PLACES = 49, 12


def tiny_clip() -> Any:
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=PLACES, projection_dim=10, bos_token_id=48, eos_token_id=END, pad_token_id=1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=4,
        projection_dim=10,
    )  # fmt: skip
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=10)
    model = CLIPModel(config).eval()
    for norm in (model.vision_model.post_layernorm, model.text_model.final_layer_norm):
        torch.nn.init.normal_(norm.weight)
    return model


def tokenizer(text: str) -> dict[str, list[int]]:
    return {"input_ids": [48, *(2 + ord(letter) % 40 for letter in text), END]}


def by_hand(clip: Any, question: str, pixels: torch.Tensor) -> list[float]:
    """The card: layer -2, norm, projection; segments of the text; minus the cosine, averaged over them."""
    states = clip.vision_model(pixels[None], output_hidden_states=True).hidden_states
    layer = states[len(states) - 2][0, 1:]
    patches = clip.vision_model.post_layernorm(layer) @ clip.visual_projection.weight.T
    ids = tokenizer(question)["input_ids"]
    texts = []
    for start in range(0, len(ids), PLACES):
        part = ids[start : start + PLACES]
        mask = [1] * len(part) + [0] * (PLACES - len(part))
        part = part + [0] * (PLACES - len(part))
        out = clip.get_text_features(torch.tensor([part]), attention_mask=torch.tensor([mask]))
        texts.append((out if isinstance(out, torch.Tensor) else out.pooler_output)[0])
    return [
        -sum(float(p @ t / (p.norm() * t.norm())) for t in texts) / len(texts)
        for p in patches
    ]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("length", [0, 3, 10, 11, 22, 30])
def test_equals_the_formula(length: int) -> None:
    """Also of questions of exactly one or two segments, and longer ones."""
    clip, pixels = tiny_clip(), torch.randn(3, 3, 24, 24)
    questions = [("what is it, and where" * 3)[:length], "where", ("what is it, and where" * 3)[:length]]
    found = clip_relevance(clip, tokenizer, questions, pixels)
    assert [values.shape for values in found] == [(36,)] * 3 and found[0].dtype == torch.float32
    for question, picture, values in zip(questions, pixels, found, strict=True):
        truth = torch.tensor(by_hand(clip, question, picture))
        torch.testing.assert_close(values, truth, rtol=1e-5, atol=1e-6)
        assert float(values.std()) > 1e-3, "the patches differ"


def test_is_a_hint_that_decides_what_stays() -> None:
    clip, model, batch = tiny_clip(), tiny_llava(), prompts([1], "left")
    pixels = torch.randn(1, 3, 24, 24)
    kept = []
    for question in ("what is it", "where"):
        with tokenprune.applied(model, "cdpruner(relevance=hint)", keep=9) as handle, torch.no_grad():
            handle.set_hints(relevance=tokenprune.clip_relevance(clip, tokenizer, [question], pixels))
            model(**batch)
            kept.append(handle.kept[0][0].tolist())
    assert len(kept[0]) == 9 and kept[0] != kept[1]


def test_what_does_not_go_together_is_refused() -> None:
    clip, pixels = tiny_clip(), torch.randn(2, 3, 24, 24)
    for questions in ("what", ["what"], ["what"] * 3):
        with pytest.raises(ValueError, match="one question for each picture"):
            clip_relevance(clip, tokenizer, questions, pixels)
    with pytest.raises(ValueError, match="has no text_model"):
        clip_relevance(clip.vision_model, tokenizer, ["what"] * 2, pixels)
