"""Relevance by a CLIP text tower: against CLIP's own towers, and as the hint that CDPruner ranks by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _tiny import PATCHES, prompts, tiny_llava
from torch.nn.functional import cosine_similarity

import tokenprune
from tokenprune import clip_relevance
from tokenprune.methods.cdpruner import CdPruner

BOS, END, ROOM = 62, 63, 12


class Words:
    """A tokenizer: one token a letter."""

    bos_token_id, eos_token_id = BOS, END

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [3 + ord(letter) % 50 for letter in text]
        return {"input_ids": [BOS, *ids, END] if add_special_tokens else ids}


@pytest.fixture(scope="module")
def clip() -> Any:
    """CLIP with a picture of 6 x 6 patches, as the tiny LLaVA has, and texts of at most twelve tokens."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {"vocab_size": 64, "max_position_embeddings": ROOM, "bos_token_id": BOS, "eos_token_id": END}
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**size, **text}, vision_config={**size, "image_size": 42, "patch_size": 7}, projection_dim=20
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5 * 1.5)
    return model


def pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 42, 42, generator=torch.Generator().manual_seed(count))


def by_layers(clip: Any, pixels: torch.Tensor, segments: list[list[int]]) -> list[float]:
    """One picture, patch by patch; the tower block by block, the last block left out."""
    tower = clip.vision_model
    with torch.no_grad():
        states = tower.pre_layrnorm(tower.embeddings(pixels[None]))
        for block in list(tower.encoder.layers)[:-1]:
            states = block(states, None)
            states = states if isinstance(states, torch.Tensor) else states[0]
        texts = [clip.text_projection(clip.text_model(torch.tensor([ids])).pooler_output[0]) for ids in segments]
        found = []
        for patch in range(1, states.shape[1]):
            feature = clip.visual_projection(tower.post_layernorm(states[0, patch]))
            found.append(sum(-float(cosine_similarity(feature, text, dim=0)) for text in texts) / len(texts))
    return found


@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 20, 27])
def test_is_minus_the_cosine_of_patches_and_text_averaged_over_segments(clip: Any, length: int) -> None:
    question = "where is the cat, and what is on it"[:length]
    ids = Words()(question, add_special_tokens=False)["input_ids"]
    segments = [[BOS, *ids[start : start + 10], END] for start in range(0, max(length, 1), 10)]
    found = clip_relevance(clip, Words(), question, pictures(2))
    assert len(found) == 2 and len(segments) == max(1, -(-length // 10))
    for own, pixels in zip(found, pictures(2)):
        assert own.shape == (PATCHES,) and own.dtype == torch.float32
        torch.testing.assert_close(own, torch.tensor(by_layers(clip, pixels, segments)), rtol=1e-5, atol=1e-6)


def test_each_picture_has_its_question_and_the_sign_can_be_turned(clip: Any) -> None:
    found = clip_relevance(clip, Words(), ["a dog", "red"], pictures(2))
    for place, question in enumerate(("a dog", "red")):
        alone = clip_relevance(clip, Words(), question, pictures(2)[place : place + 1])[0]
        torch.testing.assert_close(found[place], alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[0], clip_relevance(clip, Words(), "red", pictures(2))[0], atol=1e-3)
    turned = clip_relevance(clip, Words(), ["a dog", "red"], pictures(2), sign=1)
    assert all(torch.equal(one, -other) for one, other in zip(found, turned))


def test_cdpruner_ranks_by_it(clip: Any) -> None:
    model, batch = tiny_llava(), prompts([1, 2])
    kept = []
    for questions in (["a dog", "red", "red"], ["red", "a dog", "how many"]):
        hint = clip_relevance(clip, Words(), questions, batch["pixel_values"])
        with tokenprune.applied(model, "cdpruner", keep=9, relevance="hint") as handle, torch.no_grad():
            handle.set_hints(relevance=hint)
            model(**batch)
            kept.append([indices.tolist() for images in handle.kept for indices in images])
            features = model.model.get_image_features(batch["pixel_values"])
        features = getattr(features, "pooler_output", features)
        for place, own in enumerate(hint):
            view = SimpleNamespace(
                features=features[place][None], hints={"relevance": [own]}, num_tokens=PATCHES, budget=9
            )
            assert kept[-1][place] == CdPruner(relevance="hint").select(view).indices[0].tolist()  # type: ignore[arg-type]
    assert kept[0] != kept[1]


def test_arguments_that_do_not_fit_are_refused(clip: Any) -> None:
    with pytest.raises(ValueError, match="one for each of 2 pictures, or one text for all, got 3"):
        clip_relevance(clip, Words(), ["a", "b", "c"], pictures(2))
    with pytest.raises(ValueError, match="one crop a picture"):
        clip_relevance(clip, Words(), "a", pictures(2)[None])
    with pytest.raises(ValueError, match="sign must be -1"):
        clip_relevance(clip, Words(), "a", pictures(2), sign=0)
