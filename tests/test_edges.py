"""What two parts of the engine owe each other: stages that follow one another, kinds of visuals side by side, objects
that end before others, and what is refused because no part could do it right."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from _families import VIDEO, _qwen_batch, batch_of, family
from _tiny import IMAGE, TEXT, prompts, tiny_llava
from masked_reference import relative_error
from torch import Tensor

import tokenprune
from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection, grid_places
from tokenprune.interfaces.signals import CLS_ATTENTION, LAST_ATTENTION, Signal
from tokenprune.interfaces.view import View
from tokenprune.methods.todre import DropAllStage, ToDRE
from tokenprune.methods.transprune import TransPrune
from tokenprune.methods.vtc_cls import VtcCls
from tokenprune.seams import cache_argument, cache_in

ACTING = "var(channels=[1,2,3],tau=2.2,layers=[1,2],s_min=0,rho=0,p=0.9)"


@dataclass
class Told(Pruner):
    """Keeps the first tokens and writes down what it was told of each visual."""

    name: ClassVar[str] = "told"
    hints: ClassVar[tuple[str, ...]] = ("tag",)
    default_scope: ClassVar[str] = "visual"
    heard: ClassVar[list[tuple[str, str]]] = []

    def select(self, view: View) -> Selection:
        self.heard.extend((view.site, tag) for tag in view.hints["tag"])
        return Selection(torch.arange(view.budget, device=view.features.device).expand(view.num_images, -1))


def run(model, batch, method, **more) -> tuple[tokenprune.Handle, Tensor]:
    with tokenprune.applied(model, method) as handle, torch.no_grad():
        return handle, model(**batch, **more).logits


# --- stages that follow one another -----------------------------------------------------------------------------------


def seen_scores(monkeypatch) -> list[Tensor]:
    seen: list[Tensor] = []
    stock = VtcCls.score

    def score(self, view):
        seen.append(stock(self, view))
        return seen[-1]

    monkeypatch.setattr(VtcCls, "score", score)
    return seen


@dataclass
class Watched(Pruner):
    """Ranks by [CLS] attention of one block, and writes it down."""

    name: ClassVar[str] = "watched"
    seen: ClassVar[list[Tensor]] = []

    def signals(self, tower):
        return (Signal(CLS_ATTENTION, 1),)

    def score(self, view: View) -> Tensor:
        self.seen.append(view.signal(CLS_ATTENTION, 1))
        return self.seen[-1]


def test_signals_of_a_smaller_picture_reach_the_stage_behind_it():
    model, batch = tiny_llava(), prompts([1])
    Watched.seen.clear()
    plan = ["downsample@16", {"method": Watched(), "keep": 4}]
    handle, _ = run(model, batch, plan)
    # the same picture, shrunk by hand
    small = handle.adapter.vision.resize("image", {"pixel_values": batch["pixel_values"]}, [], [(4, 4)])
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = tower(**small, output_attentions=True).attentions[1][:, :, 0, 1:].mean(1)
    (asked,) = Watched.seen
    assert asked.shape == (1, 16)
    torch.testing.assert_close(asked / asked.sum(), wanted / wanted.sum(), rtol=1e-4, atol=0)
    cells = torch.tensor(grid_places((6, 6), (4, 4)))
    assert handle.kept[0][0].tolist() == sorted(cells[wanted[0].argsort(descending=True)[:4]].tolist())


def test_smaller_pictures_of_several_sizes_are_ranked_too(monkeypatch):
    seen = seen_scores(monkeypatch)
    handle, _ = run(family("qwen2_vl"), batch_of("qwen2_vl", "ragged_left"), ["downsample@0.4", "vtc_cls@2"])
    assert seen and all(float(scores.amax(1).min()) > 0 for scores in seen)
    assert {len(kept) for row in handle.kept for kept in row} == {2}


def test_a_budget_of_fewer_pixels_is_that_of_the_whole_video():
    handle, _ = run(family("qwen2_vl"), batch_of("qwen2_vl", "mixed_left"), "downsample@6")
    assert max(len(kept) for row in handle.kept for kept in row) <= 6


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
            handle, _ = run(model, prompts([1], seed=seed), ["transprune(layers=[2,4,6])@4", var])
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
        handle, _ = run(tiny_llava(layers=8), prompts([1], seed=seed), [method, var])
        assert len(after) == len(handle.stages) == 3
        for token, value in before[2].items():
            if token in after[1]:
                assert value == after[1][token], "ranked at layer 4"
            elif token in after[0]:
                assert value == after[0][token] > 0, "ranked at layer 2, kept out at layer 4"
                kept_out += 1
    assert kept_out


def test_signals_from_between_two_cuts_of_the_tower_reach_later_stages():
    """VTC-CLS behind FlowCut: its sum has every block, each for the patches that were there."""
    model, batch, seen = tiny_llava(vision_layers=12), prompts([1]), []

    @dataclass
    class Watched(VtcCls):
        name: ClassVar[str] = "vtc_cls"

        def select(self, view):
            seen.append((view.tokens, view.signals))
            return super().select(view)

    plan = ["flowcut@12", {"at": "input", "prune": Watched(start_layer=4), "keep": 6}]
    with tokenprune.applied(model, plan) as handle, torch.no_grad():
        model(**batch)
        cuts = handle._engine.last.tower[0].cuts
    ((tokens, signals),) = seen
    assert sorted(signal.layer for signal in signals) == list(range(4, 11)) and len(cuts) > 2
    # the tower run again, cut alike: block by block, what [CLS] pays to the patches of that block
    from transformers.models.clip.modeling_clip import eager_attention_forward

    tower = model.model.vision_tower
    states = tower.pre_layrnorm(tower.embeddings(batch["pixel_values"]))
    alive = torch.arange(36)
    for block, layer in enumerate(tower.encoder.layers[:11]):
        attention = layer.self_attn
        normed = layer.layer_norm1(states)
        query, key, value = (
            getattr(attention, name)(normed).unflatten(-1, (4, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed, weights = eager_attention_forward(attention, query, key, value, None, attention.scale)
        states = states + attention.out_proj(mixed.flatten(2))
        states = states + layer.mlp(layer.layer_norm2(states))
        (found,) = [values for signal, values in signals.items() if signal.layer == block] or [None]
        if found is not None:
            row = torch.zeros(36).index_copy(0, alive, weights[0, :, 0, 1:].mean(0))
            assert relative_error(found[0], row[tokens[0]]) < 1e-5 and bool((found > 0).all())
        for _, (left,) in [cut for cut in cuts if cut[0] == block]:
            same = torch.isin(alive, left).nonzero()[:, 0]
            states, alive = torch.cat([states[:, :1], states[:, 1:][:, same]], dim=1), left


@pytest.mark.parametrize("keep", [1, 5, 20])
@pytest.mark.parametrize("site", ["vision:0", "vision:1", "vision:2", "vision:5"])
def test_flowcut_at_a_site_of_ones_own_keeps_its_budget(site, keep):
    model = tiny_llava(vision_layers=8)
    handle, _ = run(model, prompts([1, 2]), {"at": site, "prune": "flowcut", "keep": keep})
    assert {len(kept) for row in handle.kept for kept in row} == {keep} and len(handle.stages) == 1
    with pytest.raises(ValueError, match="has no meaning beside at="):
        tokenprune.apply(model, {"at": site, "prune": "flowcut", "text_stage": False, "keep": keep})


def test_todre_takes_its_pivot_from_the_thumbnail_behind_a_cut_too():
    model, pivots, spared = family("llava_next"), 0, 0

    @dataclass
    class Watched(ToDRE):
        name: ClassVar[str] = "todre"

        def first(self, view):
            nonlocal pivots, spared
            found = super().first(view)
            if view.rasters[0].kind == "thumbnail":
                (scores,) = view.signals.values()
                for row, tokens in enumerate(view.tokens):
                    inside = tokens < view.rasters[0].num_tokens
                    best = scores[row].masked_fill(~inside, -1).argmax()
                    pivots += 1
                    spared += int(scores[row].argmax() != best)
                    assert int(found[row]) == int(best)
            return found

    for seed in range(6):
        plan = [{"at": "vision:1", "prune": "random", "keep": 0.7}, {"at": "input", "prune": Watched(), "keep": 6}]
        run(model, batch_of("llava_next", "ragged_left", seed), plan)
    assert pivots > 10 and spared > 3


@pytest.mark.parametrize("before", [False, True])
def test_todre_asks_the_last_token_where_no_text_follows_the_pictures(before):
    """Its attention to the picture is far above tau, so that nothing leaves; of no rows the share would be 0."""
    batch = prompts([2])
    end = int((batch["input_ids"] == IMAGE).nonzero()[-1, 1]) + 1
    batch = {**batch, "input_ids": batch["input_ids"][:, :end], "attention_mask": batch["attention_mask"][:, :end]}
    if not before:  # one picture, so that no text stands between pictures either
        batch = prompts([1])
        end = int((batch["input_ids"] == IMAGE).nonzero()[-1, 1]) + 1
        batch = {**batch, "input_ids": batch["input_ids"][:, :end], "attention_mask": batch["attention_mask"][:, :end]}
    handle, _ = run(tiny_llava(), batch, "todre@9")
    assert {len(kept) for kept in handle.kept[0]} == {9}
    with torch.no_grad():
        matrix = tiny_llava(attention="eager")(**batch, output_attentions=True).attentions[2].mean(1)[0]
    visual = batch["input_ids"][0] == IMAGE
    seen: list[dict[str, float]] = []

    @dataclass
    class Watched(DropAllStage):
        def select(self, view):
            seen.append({signal.name: float(values[0]) for signal, values in view.signals.items()})
            return super().select(view)

    run(tiny_llava(), batch, [{"at": "layer:3", "prune": Watched(tau=0.0), "keep": 1.0}])
    text = ~visual & (torch.arange(len(visual)) > int(visual.nonzero()[0]))
    rows = matrix[text] if bool(text.any()) else matrix[-1:]
    assert seen[0]["text_to_visual"] == pytest.approx(float(rows[:, visual].sum(1).mean()), rel=1e-5) and rows.numel()
    assert bool(text.any()) == before


def test_each_cut_is_filed_under_the_site_that_left_it():
    model = tiny_llava(vision_layers=8)
    handle, _ = run(model, prompts([1]), "flowcut(text_stage=false)@8")
    assert {site: len(rows[0][0]) for site, rows in handle.kept_at.items()} == {handle.stages[-1].site: 8}


# --- kinds of visuals side by side ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vflowopt(cell=3.0)@6", "todre@6", "random@6"])
def test_a_picture_is_cut_alike_alone_and_beside_a_video_of_its_size(method):
    model = family("qwen2_vl")
    alone = _qwen_batch("qwen2_vl", [[(6, 6)]], "left", 3)
    row, pixels, grid = alone["input_ids"], alone["pixel_values"], alone["image_grid_thw"]
    ids = torch.cat([row.masked_fill(row == IMAGE, VIDEO), row])
    other = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    beside = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_grid_thw": grid,
        "mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long(), "pixel_values_videos": other,
        "video_grid_thw": grid,
    }  # fmt: skip
    first, one = run(model, alone, method)
    second, two = run(model, beside, method)
    assert torch.equal(first.kept[0][0], second.kept[1][0])
    torch.testing.assert_close(one[0, -1], two[1, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", ["vision:0", "input"])
def test_hints_inside_the_tower_are_those_of_the_batch(site):
    """The batch shows picture, video, video, picture, and the tower runs all pictures first."""
    tags = ["A-image", "B-video", "C-video", "D-image"]
    Told.heard.clear()
    with tokenprune.applied(family("qwen2_vl"), [{"method": Told(), "keep": 4, "at": site}]) as handle, torch.no_grad():
        handle.set_hints(tag=tags)
        family("qwen2_vl")(**batch_of("qwen2_vl", "mixed_left"))
    own = [tag for where, tag in Told.heard if where == site]
    assert set(own) == set(tags)
    if site == "vision:0":  # pictures first, then the frames of each video
        assert own[:2] == ["A-image", "D-image"] and own[2:] == sorted(own[2:]) and own[2][0] == "B"


# --- objects that end before others -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vtc_cls@8", "fastv@8", "var(channels=[1],layers=[1,2])"])
def test_a_model_is_freed_though_its_method_was_never_removed(method):
    model = tiny_llava()
    there = weakref.ref(model)
    handle = tokenprune.apply(model, method)
    del handle, model
    gc.collect()
    assert there() is None


def test_features_computed_outside_a_forward_are_not_hoarded():
    model, batch = tiny_llava(), prompts([1])
    with tokenprune.applied(model, "vtc_cls@8") as handle, torch.no_grad():
        features = [weakref.ref(model.get_image_features(batch["pixel_values"])) for _ in range(3)]
        gc.collect()
        assert [reference() for reference in features] == [None, None, None]
        assert handle._engine.calls.now is None and handle._engine.calls.tower is None


@pytest.mark.parametrize("method", ["vtc_cls@8", "vtc_cls(positions=keep)@8", "fastv@8"])
def test_a_pruned_cache_is_refused_by_a_model_that_does_not_know(method):
    model, batch = tiny_llava(), prompts([1])
    with tokenprune.applied(model, method), torch.no_grad():
        first = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[9, 10, 11]])], 1)
        turn = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
        model.generate(ids, **cache_argument(copy.deepcopy(cache_in(first))), **turn)
    with pytest.raises(RuntimeError, match="holds a pruned prompt"), torch.no_grad():
        model.generate(ids, **cache_argument(cache_in(first)), **turn)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["uniform@8", "fastv@8"])
def test_a_mask_that_hides_part_of_a_picture(method):
    batch = prompts([1, 1])
    batch["attention_mask"][1, (batch["input_ids"][1] == IMAGE).nonzero()[:3, 0]] = 0
    with pytest.raises(ValueError, match="hides 3 of the 36 visual tokens of a picture in row 1"):
        run(tiny_llava(), batch, method)


def test_a_sliding_window_shorter_than_the_prompt():
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

    clip = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=42, patch_size=7
    )
    for window in (16, 4096):
        text = MistralConfig(**TEXT, sliding_window=window)
        config = LlavaConfig(vision_config=clip, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2)
        model = LlavaForConditionalGeneration(config).eval()
        if window == 4096:
            handle, _ = run(model, prompts([1]), "fastv@8")
            assert len(handle.kept[0][0]) == 8
            continue
        with pytest.raises(ValueError, match="see the last 16 tokens only"):
            run(model, prompts([1]), "fastv@8")


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


@pytest.mark.parametrize(
    "entry",
    [
        {"method": "fastv", "layer": 3, "at": "layer:2"}, {"method": "pyramiddrop", "layers": [1, 2], "at": "layer:3"},
        {"method": "todre", "tau": 9, "at": "input"}, {"method": "vflowopt", "first": 0.5, "at": "input"},
        {"method": "transprune", "schedule": "low", "at": "layer:3"},
    ],
)  # fmt: skip
def test_options_that_a_site_makes_void(entry):
    with pytest.raises(ValueError, match="has no meaning beside at="):
        tokenprune.apply(tiny_llava(), {**entry, "keep": 8})


def test_a_decoder_signal_before_the_decoder():
    @dataclass
    class Mine(Pruner):
        name: ClassVar[str] = "mine"

        def signals(self, tower):
            return (Signal(LAST_ATTENTION, 1),)

    with pytest.raises(ValueError, match="at 'layer:K' only, and was asked for at 'input'"):
        tokenprune.apply(tiny_llava(), Mine(), keep=4)


# --- nothing kept back, and what is off -------------------------------------------------------------------------------


def test_todre_keeps_everything_where_everything_shall_stay():
    model = tiny_llava(layers=8)
    ids = torch.cat([prompts([1])["input_ids"], torch.randint(8, 64, (1, 400))], 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": prompts([1])["pixel_values"]}
    with torch.no_grad():
        stock = model(**batch).logits
    _, own = run(model, batch, {"method": "todre", "keep": 1.0, "tau": 9})
    assert torch.equal(own, stock)


@pytest.mark.parametrize("method", ["var(p=0)", "var(layers=[])"])
def test_an_intervention_that_is_off_wants_nothing(method):
    model = tiny_llava()
    with tokenprune.applied(model, method) as handle, torch.no_grad():
        model(**prompts([1]))
        assert handle.interventions[0].wants_prompts == 0
        assert "off: p, rho, s_min or layers" in str(handle.report())


def test_beams_of_a_prompt_are_one_prompt_to_discovery():
    model = tiny_llava()
    with tokenprune.applied(model, "var(channels=discover,calibrate=4)") as handle, torch.no_grad():
        model.generate(**prompts([1]), max_new_tokens=2, num_beams=3, do_sample=False)
        assert handle.interventions[0].wants_prompts == 3
        model(**prompts([1, 1], seed=5))
        assert handle.interventions[0].wants_prompts == 1
