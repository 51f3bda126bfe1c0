"""Decoders in which a token does not simply see all before it: windows and chunks, rotations that differ by layer,
layers that go along the row, keys that layers share. Pruned equals masked, or it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _decoders import DECODERS, llava_with
from _masked_whole import WholeMasked, compare_whole
from _tiny import IMAGE, prompts
from _zoo_all import zoo_batch, zoo_model
from masked_reference import compare, relative_error, run_pruned

import tokenprune
from tokenprune.interfaces.adapter import Adapter
from tokenprune.seams import cache_argument, cache_in

TOLERANCE = 1e-5
SEE_LESS: dict[str, tuple[str, dict[str, Any], str]] = {
    "window in all layers": ("mistral", {"sliding_window": 24}, "sdpa"),
    "window in some layers": ("cohere2", {"sliding_window": 24}, "sdpa"),
    "window and two thetas": ("gemma3", {"sliding_window": 24}, "sdpa"),
    "window, eager": ("gemma2", {"sliding_window": 24}, "eager"),
    "window and sinks, eager": ("gpt_oss", {"sliding_window": 24}, "eager"),
    "chunks": ("llama4", {"attention_chunk_size": 16}, "sdpa"),
    "chunks, eager": ("llama4", {"attention_chunk_size": 16}, "eager"),
    "along the row": ("lfm2", {}, "sdpa"),
}
PLANS: dict[str, Any] = {
    "input, keep": {"at": "input", "prune": "random", "keep": 9, "positions": "keep"},
    "input, compact": {"at": "input", "prune": "random", "keep": 9, "positions": "compact"},
    "layer 2, keep": {"at": "layer:2", "prune": "random", "keep": 9, "positions": "keep"},
    "three cuts": [
        {"at": "input", "prune": "random", "keep": 20, "positions": "compact"},
        {"at": "layer:1", "prune": "random", "keep": 11, "positions": "compact"},
        {"at": "layer:3", "prune": "random", "keep": 5, "positions": "keep"},
    ],
}


def _model(monkeypatch: pytest.MonkeyPatch, name: str, attention: str, **more: Any) -> Any:
    cls, own = DECODERS[name]
    monkeypatch.setitem(DECODERS, "tried", (cls, {**own, **more}))
    return llava_with("tried", attention)


@pytest.mark.parametrize("plan", list(PLANS))
@pytest.mark.parametrize("case", list(SEE_LESS))
def test_removal_equals_masking(monkeypatch: pytest.MonkeyPatch, case: str, plan: str) -> None:
    name, more, attention = SEE_LESS[case]
    model, batch = _model(monkeypatch, name, attention, **more), prompts([1, 3, 0, 2])
    run = run_pruned(model, PLANS[plan], None, batch, tokens=20, silent=[IMAGE])
    compare_whole(run, batch, TOLERANCE, [IMAGE])


@pytest.mark.parametrize("case", ["window in all layers", "window in some layers", "chunks"])
def test_a_window_counted_in_what_is_left_is_another(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    name, more, attention = SEE_LESS[case]
    model, batch = _model(monkeypatch, name, attention, **more), prompts([1, 2])
    monkeypatch.setattr("tokenprune.engine.engine.reach", lambda config: None)
    run = run_pruned(model, "random", 9, batch, tokens=1, verify=False)  # where it is tried, it is refused
    assert relative_error(run["logits"], WholeMasked(run, batch).logits()) > 1e-3


def test_layers_keep_the_rotation_of_their_own_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept positions are cut out of the tables that a layer was given, which differ by its kind."""
    model, batch = llava_with("gemma3"), prompts([1, 2])
    compare(run_pruned(model, PLANS["layer 2, keep"], None, batch), batch, TOLERANCE)
    monkeypatch.setattr(Adapter, "layer_kind", lambda self, layer: "")
    run = run_pruned(model, PLANS["layer 2, keep"], None, batch, tokens=1)
    monkeypatch.undo()
    assert relative_error(run["logits"], WholeMasked(run, batch).logits()) > 1e-3, "the test cannot fail"


@pytest.mark.parametrize("method", ["divprune", {"at": "layer:2", "prune": "divprune", "keep": 6}])
@pytest.mark.parametrize("case", ["window in all layers", "window in some layers", "chunks", "along the row"])
def test_two_turns_are_one_prompt(monkeypatch: pytest.MonkeyPatch, case: str, method: Any) -> None:
    """A second picture in a later turn; the pruned cache holds what the window needs, and states run on."""
    name, more, attention = SEE_LESS[case]
    model, batch = _model(monkeypatch, name, attention, **more), prompts([2])
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    length, first = ids.shape[1], int((ids[0] == IMAGE).nonzero()[36]) - 1
    places = torch.arange(length)[None]
    keep = {"keep": 6} if isinstance(method, str) else {}
    with tokenprune.applied(model, method, **keep) as handle, torch.no_grad():
        whole = model(input_ids=ids, pixel_values=pixels, position_ids=places).logits[0, -4:]
        kept = handle.kept[0]
        one = model(input_ids=ids[:, :first], pixel_values=pixels[:1], position_ids=places[:, :first])
        two = model(
            input_ids=ids[:, first:], pixel_values=pixels[1:], position_ids=places[:, first:],
            attention_mask=torch.ones_like(ids), **cache_argument(cache_in(one)),
        )  # fmt: skip
        assert torch.equal(handle.kept[0][0], kept[1])
    assert relative_error(two.logits[0, -4:], whole) < TOLERANCE


@pytest.mark.parametrize("name", ["gemma3_window", "lfm2_vl", "gemma4"])
def test_beams_of_decoders_whose_layers_hold_different_things(name: str) -> None:
    model, batch = zoo_model(name), zoo_batch(name)
    with torch.no_grad(), tokenprune.applied(model, "random", 4) as handle:
        model(**batch)
        kept = handle.kept
        model.generate(**batch, num_beams=3, max_new_tokens=5, do_sample=False)
        for row, found in enumerate(handle.kept):
            assert all(torch.equal(a, b) for a, b in zip(found, kept[row // 3]))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_cut_behind_keys_that_later_layers_share() -> None:
    with pytest.raises(ValueError, match="attend to the keys of layer 2.*Cut at 'layer:2' or before"):
        tokenprune.apply(zoo_model("gemma4"), {"at": "layer:3", "prune": "random", "keep": 4})


def test_pictures_that_see_both_ways_have_to_be_named() -> None:
    batch = zoo_batch("paligemma")
    real = batch["attention_mask"][0].bool()
    count = int((batch["input_ids"][0] == IMAGE).sum()) // 36
    alone = {"input_ids": batch["input_ids"][:1, real], "pixel_values": batch["pixel_values"][:count]}
    model = zoo_model("paligemma")
    silent = pytest.raises(ValueError, match="does not say which tokens are pictures")
    with tokenprune.applied(model, "random", 4), torch.no_grad(), silent:
        model(**alone)


def test_padding_that_would_pass_by_a_state() -> None:
    model = llava_with("lfm2")
    with tokenprune.applied(model, "random", 9), torch.no_grad():
        model(**prompts([1, 2], "right"))
        with pytest.raises(ValueError, match="runs over padding on the right before the answer"):
            model.generate(**prompts([1, 2], "right"), max_new_tokens=2)
        batch = prompts([1, 1])
        first = model(**batch)
        later = prompts([1, 2], seed=2)
        mask = torch.cat([batch["attention_mask"], later["attention_mask"]], dim=1)
        with pytest.raises(ValueError, match="padding between two turns.*Prune later turns one row at a time"):
            model(**{**later, "attention_mask": mask}, **cache_argument(cache_in(first)))


def test_attention_that_is_scaled_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(monkeypatch, "llama4", "sdpa", attn_temperature_tuning=True, floor_scale=40)
    scaled = pytest.raises(ValueError, match="scales attention by a token's place in the row from 40 tokens on")
    with tokenprune.applied(model, "random", 9), torch.no_grad(), scaled:
        model(**prompts([1]))


def test_a_mask_for_something_else_is_refused() -> None:
    from tokenprune.engine.whole_masks import HeldKeys, WholeMasks

    rows = torch.arange(4)[None]
    with pytest.raises(ValueError, match="given a str for a mask"):
        WholeMasks("block", 4, False).fitted("", rows, rows, HeldKeys(rows, None, 0))
