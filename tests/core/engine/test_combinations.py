"""Two things at once that work alone: turns and methods, caches and drafts, interventions and batches, copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from _families import batch_of, family
from _tiny import IMAGE, PAD, prompts, tiny_llava
from masked_reference import masked_by, relative_error
from torch import Tensor
from transformers.cache_utils import Cache, QuantizedLayer

import tokenprune
from tokenprune.seams import cache_argument, cache_in

VAR = {"method": "var", "channels": [3, 11], "tau": 1.8, "layers": [1, 2, 3], "s_min": 0, "rho": 0, "p": 0.9}
GREEDY = {"do_sample": False, "suppress_tokens": [3, 4, 5, 6], "output_logits": True, "return_dict_in_generate": True}
LAYERED = ["fastv@8", "pyramiddrop@8", "transprune@8", "todre@8"]


def generated(model: Any, batch: dict[str, Tensor], method: Any, tokens: int = 4, **more: Any) -> Any:
    with tokenprune.applied(model, method), torch.no_grad():
        return model.generate(**batch, max_new_tokens=tokens, **GREEDY, **more)


def apart(one: Any, other: Any) -> float:
    """The largest relative error of the logits of two `generate` calls with the same tokens."""
    assert torch.equal(one.sequences[:, -len(one.logits) :], other.sequences[:, -len(other.logits) :])
    return max(relative_error(a, b) for a, b in zip(one.logits, other.logits, strict=True))


# --- without a cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["random@8", "fastv@8", "flowcut@8", ["vtc_cls@12", "transprune@4"]])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_generation_without_a_cache_is_that_with_one(name: str, method: Any) -> None:
    """transformers takes gaps in position ids for packed sequences where there is neither mask nor cache."""
    if name == "internvl" and "flowcut" in str(method):
        pytest.skip("this tower cannot be cut")
    model, batch = family(name), batch_of(name, "one_left")
    assert apart(generated(model, batch, method), generated(model, batch, method, use_cache=False)) < 1e-5


def test_kept_positions_without_a_mask() -> None:
    model, batch = tiny_llava(), prompts([1])
    bare = {name: value for name, value in batch.items() if name != "attention_mask"}
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    with tokenprune.applied(model, "vtc_cls(positions=keep)@8"), torch.no_grad():
        masked, plain = model(**batch, labels=labels), model(**bare, labels=labels, use_cache=False)
    assert relative_error(plain.logits, masked.logits) < 1e-5
    assert float(plain.loss) == pytest.approx(float(masked.loss), rel=1e-5)


@pytest.mark.parametrize("method", ["random@8", *LAYERED])
def test_padding_on_the_right_without_a_cache(method: str) -> None:
    """What was generated stands behind the padding then, and is no part of the prompt."""
    batch = prompts([1, 3, 0, 2], "right")
    assert apart(generated(tiny_llava(), batch, method), generated(tiny_llava(), batch, method, use_cache=False)) < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_redistribution_without_a_cache_and_with_drafts_is_that_of_plain_decoding(seed: int) -> None:
    """Sinks are those of the prompt: neither what was generated nor what a draft proposed is among them."""
    model, draft, batch = tiny_llava(), tiny_llava(seed=3, layers=2), prompts([1], seed=seed)
    plain = generated(model, batch, VAR, 8)
    assert apart(generated(model, batch, VAR, 8, use_cache=False), plain) < 1e-5
    follows: dict[int, int] = {}
    said = [int(batch["input_ids"][0, -1]), *plain.sequences[0, -8:].tolist()]
    follows.update(reversed(list(zip(said, said[1:]))))

    def proposes(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        ids, count = kwargs["input_ids"], output.logits.shape[1]
        output.logits[:] = 0
        for place, token in enumerate(ids[0, ids.shape[1] - count :].tolist()):
            output.logits[0, place, follows.get(token, 9)] = 50
        return output

    draft.register_forward_hook(proposes, with_kwargs=True)
    draft.generation_config.assistant_confidence_threshold = 0.0
    draft.generation_config.num_assistant_tokens = 5
    assert apart(generated(model, batch, VAR, 8, assistant_model=draft), plain) < 1e-5


# --- turns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("then", ["vtc_cls@8", VAR, "random@20"])
@pytest.mark.parametrize("first", ["pyramiddrop@8", "fastv@8", ["vtc_cls@20", "fastv@6"]])
def test_a_conversation_goes_on_under_another_method(first: Any, then: Any, tokens: int) -> None:
    """A cache whose layers hold different tokens needs its masks and positions, whatever prunes next."""
    model, batch = tiny_llava(), prompts([1])
    ids = torch.randint(8, 64, (1, tokens), generator=torch.Generator().manual_seed(0))
    with tokenprune.applied(model, first), torch.no_grad():
        cache = cache_in(model(**batch))
        other = copy.deepcopy(cache)
        same = model(input_ids=ids, **cache_argument(cache)).logits
    with tokenprune.applied(model, then), torch.no_grad():
        found = model(input_ids=ids, **cache_argument(other)).logits
    assert relative_error(found, same) < 1e-6


def conversation(method: str, rows: list[int], pictures: int) -> tuple[list[list[int]], Tensor]:
    """Two turns, padded on the left, of which the second has a picture: what it keeps of it, and the last logits."""
    draw = torch.Generator().manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(8, 64, (count,), generator=draw).tolist()

    turns = [[words(3) + [IMAGE] * 36 * pictures + words(2), words(14) + [IMAGE] * 36 * pictures + words(3)],
             [words(2) + [IMAGE] * 36 + words(5), words(2) + [IMAGE] * 36 + words(5)]]  # fmt: skip
    pixels = [torch.randn(2, 3, 42, 42, generator=draw) for _ in range(2)]
    model, cache, masks = tiny_llava(), None, []
    with tokenprune.applied(model, method) as handle, torch.no_grad():
        for number, turn in enumerate(turns):
            own = [turn[row] for row in rows]
            length = max(map(len, own))
            ids = torch.tensor([[PAD] * (length - len(row)) + row for row in own])
            masks.append((ids != PAD).long())
            mask = torch.cat(masks, dim=1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
            given = {"pixel_values": pixels[number][rows]} if pictures or number else {}
            output = model(input_ids=ids, attention_mask=mask, position_ids=positions, **cache_argument(cache), **given)
            cache = cache_in(output)
        return [row[0].tolist() for row in handle.kept], output.logits[:, -1]


@pytest.mark.parametrize("pictures", [0, 1])
@pytest.mark.parametrize("method", LAYERED)
def test_padding_of_earlier_turns_is_not_looked_at(method: str, pictures: int) -> None:
    kept, logits = conversation(method, [0, 1], pictures)
    for row in range(2):
        own, alone = conversation(method, [row], pictures)
        assert kept[row] == own[0] and relative_error(logits[row], alone[0]) < 1e-5


@pytest.mark.parametrize("words", [3, 20, 60])
@pytest.mark.parametrize("method", LAYERED)
def test_a_turn_may_be_given_as_its_new_ids_alone(method: str, words: int) -> None:
    model, first, second = tiny_llava(), prompts([1]), prompts([1], seed=5)
    extra = torch.randint(8, 64, (1, words), generator=torch.Generator().manual_seed(0))
    new = torch.cat([extra, second["input_ids"]], dim=1)
    whole = torch.cat([first["input_ids"], new], dim=1)
    more = {"attention_mask": torch.ones_like(whole), "pixel_values": second["pixel_values"]}
    found = []
    for ids in (whole, new):
        with tokenprune.applied(model, method) as handle, torch.no_grad():
            cache = cache_in(model(**first))
            output = model.generate(ids, **cache_argument(cache), max_new_tokens=4, **more, **GREEDY)
            found.append((handle.kept[0][0].tolist(), output))
    assert found[0][0] == found[1][0] and apart(found[0][1], found[1][1]) < 1e-5


def test_a_text_only_row_of_a_later_turn_does_not_depend_on_its_batch_mates() -> None:
    model, first = tiny_llava(), prompts([1, 1])
    draw = torch.Generator().manual_seed(0)
    length = 45
    text = torch.randint(8, 64, (1, length), generator=draw)
    asked = torch.cat([torch.randint(8, 64, (1, 5), generator=draw), torch.full((1, 36), IMAGE),
                       torch.randint(8, 64, (1, 4), generator=draw)], dim=1)  # fmt: skip
    pixels = torch.randn(1, 3, 42, 42, generator=draw)
    logits = []
    for rows in ([0, 1], [0]):
        with tokenprune.applied(model, VAR), torch.no_grad():
            opening = {name: value[rows] for name, value in first.items()}
            cache = cache_in(model(**opening))
            ids = torch.cat([text, asked])[rows]
            given = {"pixel_values": pixels} if 1 in rows else {}
            mask = torch.cat([opening["attention_mask"], torch.ones_like(ids)], dim=1)
            positions = (mask.cumsum(1) - 1)[:, -length:]
            turn = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **given}
            logits.append(model(**turn, **cache_argument(cache)).logits[0, -length:])
    assert relative_error(logits[0], logits[1]) < 1e-5


class Lossless(QuantizedLayer):
    """A quantized layer whose backend loses nothing."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor

    def _dequantize(self, tensor: Tensor) -> Tensor:
        return tensor


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("method", ["fastv@8", "todre@8", "transprune@8"])
def test_a_picture_behind_a_quantized_cache(method: str, steps: int) -> None:
    model, first, second = tiny_llava(), prompts([1]), prompts([1], seed=5)
    with tokenprune.applied(model, method), torch.no_grad():
        cache = Cache(layers=[Lossless(residual_length=16) for _ in range(4)])
        cache = cache_in(model(**first, **cache_argument(cache)))
        for step in range(steps):
            cache = cache_in(model(input_ids=torch.tensor([[9 + step]]), **cache_argument(cache)))
        turn = {name: value for name, value in second.items() if name != "attention_mask"}
        with pytest.raises(ValueError, match="does not hold their keys as they were"):
            model(**turn, **cache_argument(cache))
    with tokenprune.applied(model, "random@8") as handle, torch.no_grad():
        cache = Cache(layers=[Lossless(residual_length=16) for _ in range(4)])
        cache = cache_in(model(**first, **cache_argument(cache)))
        model(**turn, **cache_argument(cache))
        assert len(handle.kept[0][0]) == 8


# --- copies and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["random@8", "vtc_cls@8", VAR])
def test_a_copy_of_a_wrapped_model_is_refused(method: Any) -> None:
    model = tiny_llava()
    with tokenprune.applied(model, method):
        for attempt in (copy.deepcopy, lambda m: copy.deepcopy(m.model)):
            with pytest.raises(TypeError, match=r"remove\(\) first"):
                attempt(model)
        with pytest.raises(Exception, match="pickle"):
            pickle.dumps(model)
        assert model.state_dict()
    assert torch.equal(next(copy.deepcopy(model).parameters()), next(model.parameters()))


def test_a_pruned_cache_can_be_pickled() -> None:
    model, batch = tiny_llava(), prompts([1, 2])
    with tokenprune.applied(model, ["fastv@8", VAR]), torch.no_grad():
        cache = cache_in(model(**batch))
        again = pickle.loads(pickle.dumps(cache))
        assert type(again) is type(cache) and again.get_seq_length() == cache.get_seq_length()
        ids = torch.tensor([[9, 10], [11, 12]])
        mask = torch.cat([batch["attention_mask"], torch.ones_like(ids)], dim=1)
        logits = [model(input_ids=ids, attention_mask=mask, **cache_argument(one)).logits for one in (cache, again)]
    assert torch.equal(*logits)


def test_two_wrappers_of_one_model_take_one_method() -> None:
    one, other = tiny_llava(), tiny_llava(seed=1)
    other.model = one.model
    with tokenprune.applied(one, "random@8"), pytest.raises(ValueError, match="at work on this model already"):
        tokenprune.apply(other, "random@4")
    tokenprune.apply(other, "random@4").remove()


def test_two_models_over_one_decoder_take_one_method() -> None:
    one, other = tiny_llava(), tiny_llava(seed=1)
    other.model.vision_tower, batch = one.model.vision_tower, prompts([1])
    with torch.no_grad(), tokenprune.applied(one, "fastv@8"):  # a tower may be shared
        alone = one(**batch).logits
        with tokenprune.applied(other, "flowcut@4"):
            assert torch.equal(one(**batch).logits, alone)
        assert torch.equal(one(**batch).logits, alone)
    other.model.language_model = one.model.language_model
    with tokenprune.applied(one, VAR), pytest.raises(ValueError, match=r"another model that shares .*LlamaModel"):
        tokenprune.apply(other, "random@4")
    tokenprune.apply(other, "random@4").remove()


# --- what is refused, and before anything runs ------------------------------------------------------------------------


def test_attention_matrices_beside_an_intervention_are_refused() -> None:
    model, batch = tiny_llava(attention="eager"), prompts([1])
    with torch.no_grad():
        stock = model(**batch, output_attentions=True)
        with tokenprune.applied(model, VAR), pytest.raises(ValueError, match="forms none where it acts"):
            model(**batch, output_attentions=True)
        with tokenprune.applied(model, "random@8"):
            assert len(model(**batch, output_attentions=True).attentions) == len(stock.attentions)


def test_logits_by_place_are_those_of_the_callers_places() -> None:
    model, batch = tiny_llava(), prompts([1])
    with tokenprune.applied(model, "random@8") as handle, torch.no_grad():
        by_place = model(**batch, logits_to_keep=torch.tensor([1, 40, 43])).logits
        adapter, tokens = handle.adapter, handle.kept
        text = torch.randint(8, 64, (1, 9))
        kept = model(input_ids=text, logits_to_keep=torch.tensor([3])).logits
        assert relative_error(kept[:, 0], model(input_ids=text).logits[:, 3]) < 1e-6
        assert model(**batch, logits_to_keep=2).logits.shape[1] == 2
    with torch.no_grad():
        masked = masked_by(adapter, batch, tokens, "compact")
        assert relative_error(by_place[0], model.lm_head(masked.hidden())[0, [1, 40, 43]]) < 1e-5


def test_labels_by_place_and_by_position() -> None:
    model, batch = tiny_llava(), prompts([1])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    shifted = torch.cat([labels[:, 1:], torch.full((1, 1), -100)], dim=1)
    shifted[:, 3] = 17  # not what a shift of the labels gives, so that it shows which of the two is used
    names = list(model.forward.__wrapped__.__code__.co_varnames[1:]) if hasattr(model.forward, "__wrapped__") else []
    with torch.no_grad():
        stock = model(**batch, labels=labels, shift_labels=shifted).loss
        with tokenprune.applied(model, "random", keep=1.0):
            assert torch.equal(model(**batch, labels=labels, shift_labels=shifted).loss, stock)
        with tokenprune.applied(model, "random@8") as handle:
            shifted[:, 4:8] = torch.arange(20, 24)  # of visual tokens
            before = labels.clone(), shifted.clone()
            struck = model(**batch, labels=labels, shift_labels=shifted)
            assert torch.equal(labels, before[0]) and torch.equal(shifted, before[1])
            places = (batch["input_ids"][0] == IMAGE).nonzero()[:, 0]
            left = [int(place) for rank, place in enumerate(places) if rank not in handle.kept[0][0].tolist()]
            expected = shifted.clone()
            expected[:, [place - 1 for place in left]] = -100
            assert not torch.equal(expected, shifted)
            truth = model.loss_function(struck.logits, None, vocab_size=64, shift_labels=expected)
            assert torch.equal(struck.loss, truth) and not torch.equal(model(**batch, labels=labels).loss, truth)
        if "labels" in names:
            order = names[: names.index("labels") + 1]
            given = [{**batch, "labels": labels}.get(name) for name in order]
            with tokenprune.applied(model, "random@8"):
                assert torch.equal(model(*given).loss, model(**batch, labels=labels).loss)


def test_a_prompt_that_is_a_picture_of_sinks_alone() -> None:
    ids = torch.full((1, 36), IMAGE)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": prompts([1])["pixel_values"]}
    everything = {**VAR, "tau": 0.0, "visual_sinks": "drop"}
    with tokenprune.applied(tiny_llava(), ["fastv@8", everything]) as handle, torch.no_grad():
        with pytest.raises(ValueError, match="pictures alone"):
            handle.model(**batch)
        handle.model(**prompts([1]))


def test_a_mask_of_floats_is_a_mask() -> None:
    model, batch = tiny_llava(), prompts([1, 3, 0, 2])
    for method in ("random@8", "fastv@8"):
        with tokenprune.applied(model, method), torch.no_grad():
            plain = model(**batch).logits
            cast = model(**{**batch, "attention_mask": batch["attention_mask"].float()}).logits
        assert torch.equal(plain, cast)
