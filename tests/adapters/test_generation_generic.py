"""Ways of generating on popular classes that are read off their models: beams, drafts, and a second turn that brings a
picture, each held against the masked model or against plain generation. One method at the input: what a way of
generating does to a cut does not depend on who chose it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from _masked_whole import WholeMasked
from _tiny import PAD, TEXT
from _zoo import SPECIAL, Batch
from _zoo_all import FAMILIES, KEEP, zoo_batch, zoo_model
from masked_reference import decoder_inputs, relative_error, run_pruned

import tokenprune
from tokenprune.seams import cache_argument, cache_in, with_cache

TOLERANCE = 1e-5
POPULAR = [
    "gemma3", "gemma4", "paligemma", "molmo2", "mistral3", "lighton_ocr", "llava_pixtral", "llava_siglip", "vipllava",
    "idefics2", "idefics3", "aya_vision", "deepseek_vl", "janus", "ovis2", "got_ocr2", "aria", "glm4v", "glm46v",
    "qwen3_vl_moe", "qwen2_5_omni_thinker", "video_llama_3", "paddleocr_vl", "kimi_k25", "ernie4_5_vl_moe",
    "granite4_vision", "phi4_multimodal",
]  # fmt: skip
NOT_IN_TURNS = {
    "paligemma": "all of its prompt sees itself in both directions, so two turns are no prompt",
    "gemma3": "in a later turn transformers lets no picture see itself in both directions",
    "gemma4": "as gemma3",
    "molmo2": "what its pictures are pooled from is counted over all of a prompt's",
    "idefics2": "prompts of the zoo have no separators around pictures, and two pictures share one budget there",
    "idefics3": "as idefics2",
}
NO_DRAFTS = {
    "paligemma": "transformers takes what is drafted for a part of the prompt, which sees itself in both directions",
    "ernie4_5_vl_moe": "transformers gives the model no types for what is drafted",
}
NO_DRAFT_MODEL = {
    "phi4_multimodal": "transformers hands its pixels to a draft of text, and to one of its class pixels without sizes",
}
DRAFTS = [
    (name, draft)
    for name in POPULAR
    for draft in ("a model", "the prompt")
    if name not in NO_DRAFTS and (draft == "the prompt" or name not in NO_DRAFT_MODEL)
]
ONE_PICTURE = ("glm4v", "glm46v", "granite4_vision", "phi4_multimodal")
"""With beams transformers repeats the pictures of a row each by itself, not the row's all: they are the wrong ones."""
popular = pytest.mark.parametrize("name", POPULAR)
_OF_TEXT = ("input_ids", "attention_mask", "pixel_values", "image_sizes", "image_grid_thw", "image_merge_sizes")


def _silent(model: Any) -> list[int]:
    return [token for token in SPECIAL if token < model.get_output_embeddings().weight.shape[0]]


@popular
def test_scores_of_beams_are_those_of_the_masked_model(name: str) -> None:
    """Beams share the cache of a prompt and change places in it: a wrong one would show in the score of a sequence."""
    model, batch = zoo_model(name), zoo_batch(name, "beams", [1, 1] if name in ONE_PICTURE else None)
    run = run_pruned(model, "random", KEEP, batch, tokens=1)
    with tokenprune.applied(model, "random", KEEP), torch.no_grad():
        found = model.generate(
            **batch, num_beams=2, max_new_tokens=4, do_sample=False, suppress_tokens=_silent(model),
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    tokens = found.sequences[:, batch["input_ids"].shape[1] :]
    chosen = WholeMasked(run, batch).continuation(tokens).log_softmax(-1).gather(2, tokens[..., None])
    assert relative_error(found.sequences_scores, chosen[..., 0].mean(1)) < TOLERANCE


@pytest.mark.parametrize("name", ONE_PICTURE)
def test_pictures_that_transformers_repeats_wrongly_are_refused(name: str) -> None:
    model, batch = zoo_model(name), zoo_batch(name, "beams", [1, 2])
    if name == "granite4_vision" and not hasattr(model, "_expand_multimodal_outputs"):
        pytest.skip("older transformers repeat its pixels, prompt by prompt")
    wrong = pytest.raises(ValueError, match="tokens in a row|the same image at two of its places")
    with tokenprune.applied(model, "random", KEEP), torch.no_grad(), wrong:
        model.generate(**batch, num_beams=2, max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize(("name", "draft"), DRAFTS)
def test_what_is_drafted_changes_no_token(name: str, draft: str) -> None:
    model, batch = zoo_model(name), zoo_batch(name, "drafts", [2])
    if name == "granite4_vision" and draft == "a model" and not hasattr(model, "_expand_multimodal_outputs"):
        pytest.skip("older transformers hand its pictures to the draft, which takes none")
    how = {"prompt_lookup_num_tokens": 3} if draft == "the prompt" else {"assistant_model": _drafting(name, batch)}
    given = {**batch, "max_new_tokens": 6, "do_sample": False, "suppress_tokens": _silent(model)}
    with tokenprune.applied(model, "random", KEEP), torch.no_grad():
        assert torch.equal(model.generate(**given, **how), model.generate(**given))


@pytest.mark.parametrize("name", list(NO_DRAFTS))
def test_where_the_stock_model_is_wrong_with_drafts_it_is_not_ours_to_be_right(name: str) -> None:
    """Fails once transformers has mended it: the class then belongs to the test above."""
    model, batch = zoo_model(name), zoo_batch(name, "drafts", [2])
    given = {**batch, "max_new_tokens": 2, "do_sample": False, "suppress_tokens": _silent(model)}
    how: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        plain = model.generate(**given, **how).logits[0]
        try:
            drafted = model.generate(**given, **how, assistant_model=zoo_model(name, seed=3)).logits[0]
        except IndexError:
            return
    assert relative_error(drafted, plain) > 1e-3


@pytest.mark.parametrize("name", list(NO_DRAFT_MODEL))
def test_where_the_stock_model_takes_no_draft_there_is_none_to_hold_against(name: str) -> None:
    """Fails once transformers has mended it, as above."""
    batch = zoo_batch(name, "drafts", [2])
    with torch.no_grad(), pytest.raises(AttributeError, match="'NoneType' object has no attribute 'view'"):
        zoo_model(name).generate(**batch, max_new_tokens=2, do_sample=False, assistant_model=zoo_model(name, seed=3))


@pytest.mark.parametrize("draft", ["a model", "the prompt"])
def test_drafts_that_the_prompt_would_see_are_refused(draft: str) -> None:
    """Without a cache the answer so far stands behind the prompt too, with a type of its own."""
    model, batch = zoo_model("paligemma"), zoo_batch("paligemma", "drafts", [2])
    given = {**batch, "max_new_tokens": 4, "do_sample": False, "suppress_tokens": _silent(model)}
    how = {"prompt_lookup_num_tokens": 3} if draft == "the prompt" else {"assistant_model": zoo_model("paligemma", 3)}
    if draft == "the prompt":  # something to be looked up
        batch["input_ids"][0, -4:] = torch.tensor([30, 31, 30, 31])
    with tokenprune.applied(model, "random", KEEP), torch.no_grad():
        with pytest.raises(ValueError, match="sees itself in both directions, and generate gave the . tokens"):
            model.generate(**given, **how)
        assert torch.equal(model.generate(**given, use_cache=False), model.generate(**given))


def _drafting(name: str, batch: Batch) -> Any:
    """A text model of the same vocabulary; where transformers hands a draft more arguments than that takes, another
    model of the class."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not set(batch) <= set(_OF_TEXT) or "omni" in name:  # whose positions of a draft are not those of text
        return zoo_model(name, seed=3)
    torch.manual_seed(0)
    draft = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    draft.generation_config.eos_token_id, draft.generation_config.pad_token_id = None, PAD
    return draft


@pytest.mark.parametrize("name", [name for name in POPULAR if name not in NOT_IN_TURNS])
def test_a_second_turn_brings_a_picture_to_the_cache(name: str) -> None:
    model, whole = zoo_model(name), zoo_batch(name, "turns", [2])
    with tokenprune.applied(model, "random", 1.0) as handle, torch.no_grad(), decoder_inputs(handle.adapter) as calls:
        model(**whole)
        layout, adapter = handle.last.layout, handle.adapter
    length = whole["input_ids"].shape[1]
    positions = calls[0].get("position_ids")
    positions = torch.arange(length)[None] if positions is None else positions
    first, second = (span.places for span in layout.spans)
    # behind the first picture, and what closes it
    cut = int(second.min()) - 1 - int(int(whole["input_ids"][0, int(second.min()) - 1]) in SPECIAL)
    assert int(first.max()) < cut < int(second.min())
    turns = [_turn(whole, layout, turn, cut) for turn in (0, 1)]
    kept = []
    with tokenprune.applied(model, "random", KEEP) as handle, torch.no_grad():
        call = functools.partial(model, **turns[0], position_ids=positions[..., :cut], use_cache=True)
        opening = with_cache(call, adapter.language_model.config)
        kept += handle.kept[0]
        turns[1]["attention_mask"] = whole["attention_mask"]
        found = model(
            **turns[1], position_ids=positions[..., cut:], **cache_argument(cache_in(opening)), use_cache=True
        ).logits[:, -1]
        kept += handle.kept[0]
    assert [len(own) for own in kept] == [KEEP, KEEP]
    cuts = {"cuts": [("input", kept)], "policies": {"input": "compact"}, "tower": []}
    run = {"adapter": adapter, "layout": layout, **cuts}
    assert relative_error(found, WholeMasked(run, whole).logits()[-1:]) < TOLERANCE


def _turn(whole: Batch, layout: Any, turn: int, cut: int) -> Batch:
    """The arguments of one turn of a row with two pictures, split before place `cut`."""
    length = whole["input_ids"].shape[1]
    parts = {}
    for key, value in whole.items():
        if value.shape[:2] == (1, length):
            parts[key] = value[:, :cut] if turn == 0 else value[:, cut:]
        elif value.shape[0] == 1:  # tiles by prompt
            parts[key] = value[:, turn : turn + 1]
        elif value.shape[0] == 2:
            parts[key] = value[turn : turn + 1]
        else:
            parts[key] = value.split(whole["image_grid_thw"].prod(1).tolist())[turn]
    return parts


def test_the_popular_are_in_the_zoo() -> None:
    assert set(POPULAR) <= set(FAMILIES) and len(POPULAR) >= 20
