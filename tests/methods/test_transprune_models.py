"""TransPrune in whole models: budgets, batches, other stages, further turns, and what it reads and costs."""

from __future__ import annotations

import pytest
import torch
from _families import batch_of, family
from _forward import forward
from _tiny import prompts, tiny_llava
from masked_reference import MaskedModel, compare, relative_error, run_pruned

import tokenprune
from tokenprune.capture import decoder_attention as decoder_signals
from tokenprune.interfaces.pruner import ModelDepths
from tokenprune.methods.transprune import TransPrune
from tokenprune.seams import cache_argument, cache_in

LLAVA = ModelDepths(vision=24, feature=22, decoder=32)

VARIANTS = ["official", "paper"]


def test_counts_cache_lengths_and_nesting_of_the_official_schedule():
    batch, model = prompts([1, 1, 0]), tiny_llava(layers=14)
    run = run_pruned(model, TransPrune(layers=(7, 9, 12)), 4, batch, tokens=4)
    compare(run, batch, 1e-5)
    before = [set(range(36)), set(range(36))]
    for (site, kept), count in zip(run["cuts"], (28, 20, 4)):
        assert site == {28: "layer:7", 20: "layer:9", 4: "layer:12"}[count]
        now = [set(tokens.tolist()) for tokens in kept]
        assert all(len(a) == count and a <= b for a, b in zip(now, before))
        before = now
    whole = batch["input_ids"].shape[1]
    held = [layer.keys.shape[2] for layer in run["cache"].layers]
    assert held == [whole] * 7 + [whole - 8] * 2 + [whole - 16] * 3 + [whole - 32] * 2


def test_a_budget_of_everything_changes_no_bit():
    batch, model = prompts([1, 3, 0, 2]), tiny_llava()
    with torch.no_grad():
        plain = model(**batch).logits
        with tokenprune.applied(model, "transprune", 1.0):
            assert torch.equal(model(**batch).logits, plain)
        assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prompt_is_cut_alike_alone_and_in_any_batch(variant):
    batch, model = prompts([1, 2, 1]), tiny_llava(layers=6)
    method = TransPrune(layers=(2, 3, 5), variant=variant)
    with tokenprune.applied(model, method, keep=3) as handle, torch.no_grad():
        model(**batch)
        together, done = handle.kept, 0
        for row, images in enumerate([1, 2, 1]):
            real = batch["attention_mask"][row].bool()
            alone = {"input_ids": batch["input_ids"][row : row + 1, real], "attention_mask": real[None, real].long()}
            model(**alone, pixel_values=batch["pixel_values"][done : done + images])
            done += images
            assert all(torch.equal(a, b) for a, b in zip(handle.kept[0], together[row]))


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
def test_it_composes_with_a_stage_at_the_input_and_others_between(name):
    """The history of the first cut outlives a foreign cut in between, and moves with the tokens."""
    plan = [
        {"at": "input", "prune": "vtc_cls", "keep": 24},
        {"prune": "transprune", "keep": 3, "schedule": [4, 1], "layers": [1, 3]},
        {"at": "layer:2", "prune": "random", "keep": 7},
    ]
    batch = batch_of(name, "ragged_left")
    run = run_pruned(family(name), plan, None, batch, tokens=6)
    compare(run, batch, 1e-5)
    images = len(run["layout"].spans)
    assert run["report"].visual_by_layer == (24 * images, 12 * images, 7 * images, 3 * images)


def test_crops_that_are_ranked_alone_keep_their_history():
    batch = batch_of("llava_next", "ragged_left")
    run = run_pruned(family("llava_next"), "transprune", 6, batch, tokens=4, scope="raster")
    compare(run, batch, 1e-5)
    run = run_pruned(family("llava_next"), "transprune", 1, batch, tokens=4, scope="raster")
    assert run["report"].visual_by_layer[-1] == len(run["layout"].spans)


@pytest.mark.parametrize(("alpha", "variant"), [(0.0, "official"), (1.0, "paper")])
def test_a_picture_in_a_second_turn_is_ranked_as_in_one_prompt(alpha, variant):
    """Before any cut, its tokens and the question behind it see the same keys in both; and cuts of both turns equal
    masking, layer by layer."""
    first, second = prompts([1]), prompts([1], seed=9)
    both = {key: torch.cat([first[key], second[key]], 0 if key == "pixel_values" else 1) for key in first}
    method = TransPrune(layers=(1, 2), schedule=(3, 1), alpha=alpha, variant=variant)
    model = tiny_llava()
    length, more = first["input_ids"].shape[1], second["input_ids"].shape[1]
    given = {"attention_mask": both["attention_mask"], "position_ids": torch.arange(length, length + more)[None]}
    with torch.no_grad():
        cache = cache_in(model(**first))
        with tokenprune.applied(model, method, keep=5) as handle:
            model(**{**second, **given}, **cache_argument(cache))
            alone = handle.last.cuts[0].tokens[0]
            model(**both)
            layout = handle.last.layout
            assert torch.equal(handle.last.cuts[0].tokens[1], alone)
            opening = model(**first)
            turns = [handle.last.cuts]
            output = model(**{**second, **given}, **cache_argument(cache_in(opening)))
            turns.append(handle.last.cuts)
            cuts = [(a.site, [a.tokens[0], b.tokens[0]]) for a, b in zip(*turns)]
            masked = MaskedModel(handle.adapter, both, layout, cuts, {"layer:1": "compact", "layer:2": "compact"})
    assert relative_error(output.logits[:, -1], masked.logits()[-1:]) < 1e-5


def test_nothing_is_read_while_tokens_are_generated(monkeypatch):
    calls = []
    from tokenprune.capture import token_transition as transitions

    original = transitions.token_transition
    monkeypatch.setattr(transitions, "token_transition", lambda *given: calls.append(0) or original(*given))
    batch, model = prompts([1, 2]), tiny_llava()
    with tokenprune.applied(model, "transprune@9"), torch.no_grad():
        model.generate(**batch, max_new_tokens=5, do_sample=False)
        assert len(calls) == 2, "layers 0 and 1, once"
        cache = cache_in(model(**prompts([0], seed=3)))
    assert len(calls) == 2 and type(cache).__name__ == "DynamicCache", "a prompt of text alone"
    with torch.no_grad():
        model(**batch)
    assert len(calls) == 2, "the hooks are gone"


@pytest.mark.parametrize("chunk", [128, 3])
def test_the_flops_of_the_attention_rows_are_those_that_torch_counts(chunk, monkeypatch):
    from tokenprune.evals.profiling.flops import flop_counter
    from tokenprune.state.device_timer import DeviceTimer

    monkeypatch.setattr(decoder_signals, "_CHUNK", chunk)
    model, batch, spent = tiny_llava(), prompts([1, 2]), [0, 0]
    with tokenprune.applied(model, "transprune@9") as handle, torch.no_grad(), flop_counter() as counter:

        def listen(begins: bool) -> None:
            now = counter.get_total_flops()
            spent[0], spent[1] = (spent[0], now) if begins else (spent[0] + now - spent[1], now)

        monkeypatch.setattr(DeviceTimer, "listener", listen)
        model(**batch)
        assert handle.report().flops.selection == pytest.approx(spent[0], rel=0.01) and spent[0] > 0


def test_history_goes_on_where_sinks_are_kept_out(monkeypatch):
    """With a threshold that nothing reaches, no token is kept out, and both ways must rank alike."""
    carried: dict[str, list[list[str]]] = {}
    stock = TransPrune.accumulated
    model, name = tiny_llava(layers=8), "rank"

    def accumulated(self, view):
        carried.setdefault(name, []).append(sorted(view.carry))
        return stock(self, view)

    monkeypatch.setattr(TransPrune, "accumulated", accumulated)
    for seed in range(4):
        kept = []
        for name in ("rank", "keep"):  # noqa: B007  (read by `accumulated`)
            var = f"var(channels=[1],tau=1000,layers=[1,2,3,4,5,6],visual_sinks={name})"
            handle, _ = forward(model, prompts([1], seed=seed), ["transprune(layers=[2,4,6])@4", var])
            kept.append(handle.kept[0][0].tolist())
        assert kept[0] == kept[1]
    assert carried["rank"] == carried["keep"] and ["transprune"] in carried["keep"]


def test_sinks_that_were_kept_out_of_a_ranking_keep_their_history(monkeypatch):
    before: list[dict[int, float]] = []  # by cut: the history that the ranked tokens came with
    after: list[dict[int, float]] = []  # and what was made of it
    stock = TransPrune.accumulated

    def accumulated(self, view):
        found = stock(self, view)
        tokens = list(range(view.num_tokens)) if view.tokens is None else view.tokens[0].tolist()
        had = view.carry.get("transprune", torch.zeros_like(found))
        before.append(dict(zip(tokens, had[0].tolist())))
        after.append(dict(zip(tokens, found[0].tolist())))
        return found

    monkeypatch.setattr(TransPrune, "accumulated", accumulated)
    kept_out = 0
    for seed in range(8):
        before.clear(), after.clear()
        var = "var(channels=[3,11],tau=2.6,rho=0.0,s_min=0,layers=[2,3,4,5,6],visual_sinks=keep)"
        method = {"prune": TransPrune(layers=[2, 4, 6], schedule=[4, 2, 1]), "keep": 6}
        handle, _ = forward(tiny_llava(layers=8), prompts([1], seed=seed), [method, var])
        assert len(after) == len(handle.stages) == 3
        for token, value in before[2].items():
            if token in after[1]:
                assert value == after[1][token], "ranked at layer 4"
            elif token in after[0]:
                assert value == after[0][token] > 0, "ranked at layer 2, kept out at layer 4"
                kept_out += 1
    assert kept_out
