"""Where the tokens of a picture of Phi-4 Multimodal come from and stand, and what else its prompts may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from _masked_whole import compare_whole
from _tiny import TEXT
from _zoo import BREAK, FAMILIES, SPECIAL, made, random_model
from _zoo_all import KEEP, zoo_batch, zoo_model
from masked_reference import run_pruned
from torch import Tensor, nn

import tokenprune
from tokenprune.api import adapter_for
from tokenprune.engine.prompt_reader import prompt_visuals
from tokenprune.evals.models.load import LoadedModel, load_model
from tokenprune.evals.profiling.timing import ideal_prefill
from tokenprune.seams import cache_argument, cache_in

NAME = "phi4_multimodal"
CASES = ("a", "b", "c", "d")
"""Layouts are drawn by their names: all shapes of the zoo are among them."""


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_their_cells_and_the_rest_are_separators(case: str) -> None:
    model, batch = zoo_model(NAME), zoo_batch(NAME, case)
    embed = model.model.embed_tokens_extend.image_embed
    visuals = adapter_for(model).visuals("image", batch)
    with torch.no_grad():
        masks = batch["image_attention_mask"]
        cells = embed.get_img_features(batch["image_pixel_values"].flatten(0, 1), masks.flatten(0, 1).bool())
        merged = model.model.embed_tokens_extend(
            batch["input_ids"], model.get_input_embeddings()(batch["input_ids"]),
            **{name: value for name, value in batch.items() if name.startswith("image")},
        )  # fmt: skip
        rows = merged[batch["input_ids"] == adapter_for(model).placeholder_ids["image"]]
        projected = embed.img_projection_down(nn.functional.gelu(embed.img_projection_up(cells)))
        marks = [embed.sub_img_feature_extensor[0, 0, 0], embed.global_img_feature_extensor[0, 0]]
        between = embed.img_projection_down(nn.functional.gelu(embed.img_projection_up(torch.stack(marks))))
    own = projected.unflatten(0, (len(visuals), -1))
    for visual, there, made_of in zip(visuals, rows.split([v.length for v in visuals]), own, strict=True):
        torch.testing.assert_close(there[visual.offsets], made_of.flatten(0, 1)[visual.sources])
        others = torch.ones(visual.length, dtype=torch.bool).index_fill(0, visual.offsets, False).nonzero()[:, 0]
        middle = int(visual.rasters[0].grid[0]) * (visual.rasters[0].grid[1] + 1)
        for place in others.tolist():
            torch.testing.assert_close(there[place], between[int(place == middle)])


def _shapes() -> list[tuple[int, int]]:
    """Grids of mosaics in the zoo."""
    return [(3, 3), (3, 5), (4, 2), (5, 6)]


@pytest.mark.parametrize("case", CASES)
def test_tokens_lie_over_the_picture_row_by_row(case: str) -> None:
    """Each cell of a picture is numbered, and tiles are cut out of it as the processor cuts them."""
    batch = zoo_batch(NAME, case)
    visuals = adapter_for(zoo_model(NAME)).visuals("image", batch)
    for visual, (high, wide) in zip(visuals, batch["image_sizes"].tolist(), strict=True):
        down, across = high // 8, wide // 8  # a token is 8 pixels each way
        numbers = torch.arange(down * across).view(down, across)
        tiles = numbers.view(down // 3, 3, across // 3, 3).transpose(1, 2).reshape(-1, 9)
        thumbnail = torch.full((1, 9), -1)
        by_cell = torch.cat([thumbnail, tiles, torch.full((len(visual.crops) - 1 - len(tiles), 9), -2)]).flatten()
        (rows, cols), (small, _) = (raster.grid for raster in visual.rasters)
        expected = torch.cat([numbers[:rows, :cols].flatten(), torch.full((small * small,), -1)])
        assert torch.equal(by_cell[visual.sources], expected)
        assert [raster.kind for raster in visual.rasters] == ["mosaic", "thumbnail"]


def test_a_picture_is_the_same_in_any_batch() -> None:
    """Methods draw by its pixels: what fills up a batch must not count."""
    adapter = adapter_for(zoo_model(NAME))
    batch = zoo_batch(NAME, "a")
    alone = adapter.pixel_rows("image", batch, adapter.visuals("image", batch))
    more = nn.functional.pad(batch["image_pixel_values"], (0, 0, 0, 0, 0, 0, 0, 2))
    masks = nn.functional.pad(batch["image_attention_mask"], (0, 0, 0, 0, 0, 2), value=1.0)
    larger = {**batch, "image_pixel_values": more, "image_attention_mask": masks}
    among = adapter.pixel_rows("image", larger, adapter.visuals("image", larger))
    assert all(torch.equal(one, other) for one, other in zip(alone, among, strict=True))


# --- what else a prompt may hold --------------------------------------------------------------------------------------


def _with_audio(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same prompts with two tokens of audio before the last words of each."""
    rows = len(batch["input_ids"])
    ids = batch["input_ids"].clone()
    ids[:, -4:-2] = BREAK
    generator = torch.Generator().manual_seed(0)
    heard = {
        "audio_input_features": torch.randn(rows, 4, 8, generator=generator),
        "audio_embed_sizes": torch.full((rows,), 2),
        "audio_attention_mask": torch.ones(rows, 2, dtype=torch.bool),
    }
    return {**batch, **heard, "input_ids": ids}


@pytest.mark.parametrize("method", ["random", "divprune", "fastv"])
def test_audio_beside_pictures_is_left_as_it_is(method: str) -> None:
    model, batch = zoo_model(NAME), _with_audio(zoo_batch(NAME, "audio"))
    with torch.no_grad():
        silent = model(**{name: value for name, value in batch.items() if "audio" not in name}).logits
        plain = model(**batch).logits
        assert not torch.equal(plain, silent), "it is heard"
        with tokenprune.applied(model, "random", 1.0):
            assert torch.equal(model(**batch).logits, plain)
    compare_whole(run_pruned(model, method, KEEP, batch, tokens=4, silent=SPECIAL), batch, 1e-5, SPECIAL)


def test_pictures_beside_embeddings_are_refused() -> None:
    """The stock model leaves them out without a word."""
    model, batch = zoo_model(NAME), zoo_batch(NAME)
    given = {name: value for name, value in batch.items() if name != "input_ids"}
    given["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])
    with tokenprune.applied(model, "random", KEEP), torch.no_grad(), pytest.raises(ValueError, match="Pass input_ids"):
        model(**given)


def _turning_at(place: int) -> Any:
    cls, config = made(NAME)
    config.original_max_position_embeddings = config.rope_parameters["original_max_position_embeddings"] = place
    return random_model(cls, config)


@pytest.mark.parametrize("site", ["input", "layer:2"])
def test_answers_that_pass_the_place_where_factors_change_are_refused(site: str) -> None:
    batch = zoo_batch(NAME, "long", [1, 1])
    model = _turning_at(20)  # the prompts are longer, and what is left of them shorter
    assert batch["input_ids"].shape[1] > 20
    plan = {"at": site, "prune": "random", "keep": KEEP}
    with tokenprune.applied(model, plan), torch.no_grad():
        model.generate(**batch, max_new_tokens=3, do_sample=False)
        with pytest.raises(ValueError, match=r"From position 20 on, a decoder .* turns .*positions='keep'"):
            model.generate(**batch, max_new_tokens=16, do_sample=False)
    run = run_pruned(model, {**plan, "positions": "keep"}, None, batch, tokens=16, silent=SPECIAL)
    compare_whole(run, batch, 1e-5, SPECIAL)


def test_pixels_that_generate_hands_to_later_tokens_are_passed_by() -> None:
    model, batch = zoo_model(NAME), zoo_batch(NAME, "later", [1])
    pixels = {name: value for name, value in batch.items() if name.startswith("image")}
    with tokenprune.applied(model, "random", KEEP) as handle, torch.no_grad():
        first = model(**batch, use_cache=True)
        mask = torch.cat([batch["attention_mask"], torch.ones(1, 1, dtype=torch.int64)], dim=1)
        step = {"input_ids": torch.tensor([[9]]), "attention_mask": mask, **cache_argument(cache_in(first))}
        assert model(**step, **pixels).logits.shape[1] == 1
        assert not prompt_visuals(handle.adapter, "image", {**pixels, "input_ids": step["input_ids"]})


def test_the_zoo_draws_all_shapes() -> None:
    adapter, drawn = adapter_for(zoo_model(NAME)), [zoo_batch(NAME, case) for case in CASES]
    grids = [visual.rasters[0].grid for batch in drawn for visual in adapter.visuals("image", batch)]
    assert {*grids} == {*_shapes()} and NAME in FAMILIES


# --- loading ----------------------------------------------------------------------------------------------------------


def test_it_loads_by_name_though_transformers_lists_it_among_several_modalities(tmp_path: Path) -> None:
    model = zoo_model(NAME)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu", needs_processor=False)
    assert type(loaded.model) is type(model) and loaded.adapter.name == NAME


def test_a_model_of_text_alone_is_not_loaded_and_a_sentence_says_why(tmp_path: Path) -> None:
    transformers.LlamaConfig(**TEXT).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no model that answers in text about pictures of a LlamaConfig"):
        load_model(str(tmp_path), device="cpu", needs_processor=False)


@pytest.mark.parametrize("name", [NAME, "chameleon"])
def test_the_ideal_of_a_decoder_that_merges_by_itself_is_a_prompt_of_what_stays(name: str) -> None:
    """What times are held against: the same logits, of the kept tokens alone."""
    model, batch = zoo_model(name), zoo_batch(name, "ideal", [2])
    with tokenprune.applied(model, "random", KEEP) as handle, torch.no_grad():
        pruned = model(**batch, use_cache=True, logits_to_keep=1).logits
        stays = handle.stays_by_layer
    ideal = ideal_prefill(LoadedModel(name, model, None, ""), batch, stays)
    with torch.no_grad():
        torch.testing.assert_close(ideal().logits, pruned)
