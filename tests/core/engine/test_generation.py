"""Promise 3: the generation API is whole; each way of generating is compared with the masked model or with itself."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers
from _tiny import IMAGE, PATCHES, prompts, tiny_llava
from masked_reference import MaskedModel, masked_by, relative_error
from packaging.version import Version

import tokenprune
from tokenprune.engine import prompt_selection
from tokenprune.seams import cache_argument, cache_in

LAYOUT = ([1, 3, 0, 2], "left")


@functools.cache
def model(attention: str = "sdpa"):
    return tiny_llava(attention=attention)


def sequence_scores(masked: MaskedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Mean log probability of `tokens` `[B, T]` after each prompt, by the masked model."""
    return masked.continuation(tokens).log_softmax(-1).gather(2, tokens[..., None])[..., 0].mean(1)


def beam_layouts() -> list[list[int]]:
    """Older transformers hand the pictures of a prompt with several of them to the wrong beams, pruned or not."""
    newer = Version(transformers.__version__) >= Version("5.23")
    return [[1, 1, 0, 1], [1, 3, 0, 2]] if newer else [[1, 1, 0, 1]]


@pytest.mark.parametrize("images", beam_layouts())
@pytest.mark.parametrize("positions", ["compact", "keep"])
def test_beam_search_scores_equal_the_masked_models(positions, images):
    batch = prompts(images, "left")
    with tokenprune.applied(model(), "vtc_cls", keep=9, positions=positions) as handle, torch.no_grad():
        found = model().generate(
            **batch, num_beams=3, num_return_sequences=2, max_new_tokens=6, do_sample=False,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        kept, adapter = handle.kept, handle.adapter
    assert len(kept) == 12, "three beams of four samples"
    for row in range(12):
        for image, first in zip(kept[row], kept[row - row % 3]):
            assert torch.equal(image, first), "beams of one sample keep the same tokens"
    tokens = found.sequences[:, batch["input_ids"].shape[1] :]
    masked = masked_by(adapter, batch, kept[::3], positions)
    for best in range(2):
        assert relative_error(found.sequences_scores[best::2], sequence_scores(masked, tokens[best::2])) < 1e-5


def test_sampling_is_seeded_as_ever_and_follows_the_masked_logits():
    batch = prompts(*LAYOUT)
    with tokenprune.applied(model(), "random@9") as handle, torch.no_grad():
        runs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            runs.append(
                model().generate(
                    **batch, max_new_tokens=8, do_sample=True, top_k=0, output_logits=True, return_dict_in_generate=True
                )
            )
        kept, adapter = handle.kept, handle.adapter
    assert torch.equal(runs[0].sequences, runs[1].sequences) and not torch.equal(runs[0].sequences, runs[2].sequences)
    masked = masked_by(adapter, batch, kept, "compact")
    tokens = runs[0].sequences[:, batch["input_ids"].shape[1] :]
    chosen = torch.stack(runs[0].logits, 1).log_softmax(-1).gather(2, tokens[..., None])[..., 0].mean(1)
    assert relative_error(chosen, sequence_scores(masked, tokens)) < 1e-5


@pytest.mark.parametrize("positions", ["compact", "keep"])
@pytest.mark.parametrize("images", [0, 1])
def test_a_second_turn_on_the_returned_cache(positions, images):
    first, second = prompts([1, 2]), prompts([images, images], seed=9)
    both = {"input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1),
            "attention_mask": torch.cat([first["attention_mask"], second["attention_mask"]], 1)}  # fmt: skip
    pixels = {"pixel_values": second["pixel_values"]} if images else {}
    with tokenprune.applied(model(), "vtc_cls", keep=9, positions=positions) as handle, torch.no_grad():
        mask = first["attention_mask"]
        opening = model()(**first, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        kept, cache = handle.kept, cache_in(opening)
        assert cache.get_seq_length() == mask.shape[1], "generate counts prompt tokens"
        assert max(layer.keys.shape[2] for layer in cache.layers) < mask.shape[1]
        again = copy.deepcopy(cache)
        turn = {"attention_mask": both["attention_mask"], **cache_argument(cache), **pixels}
        found = model().generate(
            input_ids=both["input_ids"],
            **turn,
            max_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        if images:
            kept = [old + new for old, new in zip(kept, handle.kept)]
        # a forward call of one's own on a copy of the cache gives the same first token
        positions_all = (both["attention_mask"].cumsum(1) - 1).clamp(min=0)
        length = second["input_ids"].shape[1]
        own = model()(
            input_ids=second["input_ids"], attention_mask=both["attention_mask"], **cache_argument(again),
            position_ids=positions_all[:, -length:], **pixels,
        )  # fmt: skip
        adapter = handle.adapter
    pixel_values = [first["pixel_values"][:1], first["pixel_values"][1:]]
    if images:
        pixel_values = [pixel_values[0], second["pixel_values"][:1], pixel_values[1], second["pixel_values"][1:]]
    masked = masked_by(adapter, {**both, "pixel_values": torch.cat(pixel_values)}, kept, positions)
    tokens = found.sequences[:, both["input_ids"].shape[1] :]
    scores = masked.continuation(tokens)
    assert torch.equal(scores.argmax(-1), tokens)
    assert relative_error(torch.stack(found.logits, 1), scores) < 1e-5
    assert relative_error(own.logits[:, -1], scores[:, 0]) < 1e-5


def test_inputs_embeds_with_pictures_equal_input_ids():
    batch = prompts(*LAYOUT)
    embeds = model().get_input_embeddings()(batch["input_ids"])
    rest = {key: value for key, value in batch.items() if key != "input_ids"}
    with tokenprune.applied(model(), "holov@9") as handle, torch.no_grad():
        by_ids = model().generate(**batch, max_new_tokens=6, do_sample=False)[:, -6:]
        kept = handle.kept
        by_embeds = model().generate(inputs_embeds=embeds, **rest, max_new_tokens=6, do_sample=False)
        assert torch.equal(by_embeds, by_ids)
        assert all(torch.equal(a, b) for rows in zip(kept, handle.kept) for a, b in zip(*rows))


@pytest.mark.parametrize("side", ["left", "right"])
def test_training_loss_and_gradients_equal_the_masked_models(side):
    batch = prompts([1, 3, 0, 2], side)
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] == IMAGE), -100)
    labels[:, :4] = -100
    # the token before a label must be one that stays: first words after a picture are prompt here
    before = torch.roll(batch["input_ids"] == IMAGE, 1, dims=1)
    labels[before] = -100
    # what padding says of the first token is garbage in any model
    labels[:, 1:][batch["attention_mask"][:, :-1] == 0] = -100
    net, positions = model(), (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    projector = net.model.multi_modal_projector.linear_1.weight
    net.zero_grad()
    with tokenprune.applied(net, "vtc_cls@9") as handle:
        output = net(**batch, labels=labels, position_ids=positions)
        as_tuple = net(**batch, labels=labels, position_ids=positions, return_dict=False)
        output["loss"].backward()
        kept, adapter = handle.kept, handle.adapter
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)
    gradient, net_grad = projector.grad.clone(), net.zero_grad()
    masked = masked_by(adapter, batch, kept, "compact")
    logits = net.lm_head(masked.hidden())
    truth = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    truth.backward()
    assert relative_error(output.loss.detach(), truth.detach()) < 1e-5
    assert relative_error(gradient, projector.grad) < 1e-4
    assert net_grad is None


def test_a_sample_is_pruned_alike_alone_and_in_any_batch():
    batch = prompts(*LAYOUT)
    starts = [0, 1, 4, 4]
    for name in ("random", "todre", "holov"):
        with tokenprune.applied(model(), name, keep=9) as handle, torch.no_grad():
            together = model()(**batch).logits[:, -1]
            kept = handle.kept
            for row, images in enumerate([1, 3, 0, 2]):
                real = batch["attention_mask"][row].bool()
                alone = {
                    "input_ids": batch["input_ids"][row, real][None],
                    "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.int64),
                }
                if images:
                    alone["pixel_values"] = batch["pixel_values"][starts[row] : starts[row] + images]
                logits = model()(**alone).logits[:, -1]
                assert all(torch.equal(a, b) for a, b in zip(handle.kept[0], kept[row]))
                if name != "random" and images < 2:
                    assert relative_error(logits[0], together[row]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_same_tokens_on_separated_scores(dtype):
    half = copy.deepcopy(model()).to(dtype)
    batch = prompts([2])
    with torch.no_grad(), tokenprune.applied(half, "vtc_cls@9") as handle:
        found = half.generate(
            **{**batch, "pixel_values": batch["pixel_values"].to(dtype)}, max_new_tokens=4, do_sample=False
        )
        assert found.shape[1] == batch["input_ids"].shape[1] + 4 and len(handle.kept[0]) == 2
        halves = half(**{**batch, "pixel_values": batch["pixel_values"].to(dtype)}).logits[0, -1].float()
        low = handle.kept[0]
    with torch.no_grad(), tokenprune.applied(model(), "vtc_cls@9") as handle:
        full = model()(**batch).logits[0, -1]
        agreement = [len(set(a.tolist()) & set(b.tolist())) / 9 for a, b in zip(low, handle.kept[0])]
        if all(share == 1 for share in agreement):
            assert relative_error(halves, full) < 0.1
    assert min(agreement) >= 8 / 9, "at most a near-tie at the border may change"


def test_assisted_decoding_crops_the_pruned_cache():
    batch, draft = prompts([1]), tiny_llava(seed=3, layers=2)
    with tokenprune.applied(model(), "vtc_cls@9"), torch.no_grad():
        plain = model().generate(**batch, max_new_tokens=12, do_sample=False)
        assisted = model().generate(**batch, max_new_tokens=12, do_sample=False, assistant_model=draft)
    assert torch.equal(plain, assisted)


def test_drafts_are_no_words_of_the_question():
    """The prompt comes with what was drafted for it: methods that read its words do not read those."""
    stock, seen, drafted = prompt_selection.instruction_embedding, [], []
    batch = prompts([1])
    ids = batch["input_ids"][0].tolist()
    words = torch.tensor([[*ids[: ids.index(IMAGE)], *[IMAGE] * PATCHES, 9, 10, 11, 12, 13, 9, 10]])
    batch = {**batch, "input_ids": words, "attention_mask": torch.ones_like(words)}

    def noted(prompt, hidden, sample):
        drafted.append(prompt.drafted)
        seen.append(stock(prompt, hidden, sample))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(prompt_selection, "instruction_embedding", noted)
        with tokenprune.applied(model(), "cdpruner@9"):
            model().generate(**batch, max_new_tokens=6, do_sample=False)
            model().generate(**batch, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=3)
    assert drafted == [0, 3]
    assert torch.equal(seen[0], seen[1])


def test_cropping_into_pictures_is_refused_and_reset_makes_an_ordinary_cache():
    batch = prompts([1])  # ends with six words after the picture
    with tokenprune.applied(model(), "vtc_cls@9"), torch.no_grad():
        cache = cache_in(model()(**batch))
        length = cache.get_seq_length()
        cropped = copy.deepcopy(cache)
        cropped.crop(-2)
        assert (
            cropped.get_seq_length() == length - 2
            and cropped.layers[0].keys.shape[2] == cache.layers[0].keys.shape[2] - 2
        )
        again = model()(input_ids=batch["input_ids"][:, -2:], **cache_argument(cropped)).logits[:, -1]
        assert relative_error(again, model()(**batch).logits[:, -1]) < 1e-5
        with pytest.raises(ValueError, match="Cannot crop 7 tokens"):
            cache.crop(-7)
        kind = type(cache)
        cache.reset()
        assert issubclass(kind, type(cache)) and kind is not type(cache) and not hasattr(cache, "tokenprune")
