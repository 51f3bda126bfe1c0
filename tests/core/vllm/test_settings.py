"""What an engine and a request say, read without vLLM."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from _paths import ROOT

from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.signals import TowerInfo
from tokenprune.interfaces.visual import Raster, Visual, one_raster
from tokenprune.registry import list_methods
from tokenprune.vllm.families import FAMILIES, vit_facts
from tokenprune.vllm.selection import try_methods
from tokenprune.vllm.settings import WHOLE, Choice, ModelFacts, engine_text, read_setting
from tokenprune.vllm.towers import CLS_SIGNALS, PATCH_ONLY_SIGNALS

LLAVA = ModelFacts(TowerInfo(6, 4, True, 4, 32), CLS_SIGNALS, 5, 4)
QWEN = ModelFacts(TowerInfo(4, 3, False, 4, 32), PATCH_ONLY_SIGNALS, 4, 4, mrope=True, one_size=False)
PICTURE = one_raster((24, 24))


def test_a_request_picks_a_method_and_a_budget():
    setting = read_setting("divprune@64 | uniform | holov(variant=official)@0.25", LLAVA)
    assert setting.names == ("divprune", "uniform", "holov(variant=official)") and setting.keeps == (64, 64, 0.25)
    asked = {None: (0, 64), "@32": (0, 32), "uniform": (1, 64), "uniform@0.5": (1, 0.5), "holov": (2, 0.25),
             " holov(variant=official) @ 7": (2, 7), WHOLE: (0, 1.0)}  # fmt: skip
    for text, (method, keep) in asked.items():
        assert setting.choice(text) == Choice(method, keep), text
    assert [setting.length(setting.choice(text), PICTURE) for text in (None, "@0.5", WHOLE, "@999")] == [
        64,
        288,
        576,
        576,
    ]


def test_requests_that_mean_the_same_are_spelt_the_same():
    setting = read_setting("divprune@64 | uniform", LLAVA)
    texts = {setting.text(setting.choice(text)) for text in (None, "@64", "divprune", " divprune@64")}
    assert texts == {"divprune@64"}
    for text in (None, "uniform@0.5", WHOLE, "@3"):
        choice = setting.choice(text)
        assert setting.choice(setting.text(choice)) == choice


@pytest.mark.parametrize(
    "text, says",
    [
        ("divprun@64", "Did you mean 'divprune'"),
        ("divprune", "Say how many visual tokens"),
        ("divprune@0", "at least 1"),
        ("divprune@1.5", "kept fraction"),
        ("divprune@many", "A budget is"),
        ("divprune@avg64", "mean over the decoder's layers"),
        ("divprune(colour=red)@64", "no option 'colour'"),
        ("divprune@64 | divprune@32", "twice"),
        ("divprune@64 | ", "Known"),
        ("divprune@64 + var", "several things at once"),
        ("var", "Say how many"),
        ("var@64", "takes no budget"),
        ("fastv@64", "inside the decoder"),
        ("pyramiddrop@64", "inside the decoder"),
        ("tome@64", "inside the vision tower"),
        ("downsample@64", 'resize pictures themselves .* like {"max_pixels": 100352} in mm_processor_kwargs'),
        ("pixelprune@64", "cuts at the pixels, .* take whole pictures"),
        ("prumerge(count=outliers)@64", "decides by picture"),
        ("cdpruner@64", "words of the prompt"),
        ("oracle@64", "needs boxes"),
        ("era@64", "weighs merged tokens"),
        ("evs@64", "positions=compact"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_when_an_engine_starts(text, says):
    with pytest.raises(ValueError, match="(?s)" + says.replace("(", r"\(")):
        read_setting(text, LLAVA)


def test_what_a_sentence_proposes_runs():
    read_setting("evs(positions=compact)@64", LLAVA)
    read_setting("era(key_bias=false)@64", LLAVA)


def test_a_method_that_needs_what_the_tower_has_not():
    bare = ModelFacts(QWEN.tower, ("tower_states",), 4, 4, mrope=True, one_size=False)
    with pytest.raises(ValueError, match="reads sink_attention of the vision tower, and that of this model gives"):
        read_setting("vtc_cls@64 | divprune", bare)
    with pytest.raises(ValueError, match="3-D ids"):
        read_setting("divprune(positions=compact)@64", QWEN)
    shallow = ModelFacts(TowerInfo(6, 2, True, 4, 32), CLS_SIGNALS, 1, 4)
    with pytest.raises(ValueError, match="of which vLLM runs blocks 0 to 0"):
        read_setting("vtc_cls@64", shallow)


@pytest.mark.parametrize(
    "request_text, says",
    [
        ("holov", "not started with the method 'holov'"),
        ("divprun@3", "Did you mean 'divprune'"),
        ("@0", "at least 1"),
        ("@x", "A budget is"),
        ("@avg3", "mean over"),
        (5, "is a text"),
        ("", "is a text"),
        ({"keep": 3}, "is a text"),
    ],
)
def test_a_bad_request_is_told_why(request_text, says):
    with pytest.raises(ValueError, match=says):
        read_setting("divprune@64 | uniform", LLAVA).choice(request_text)


def test_an_engines_text_is_a_text():
    assert engine_text(None) is None and engine_text({"size": 3}) is None
    for wrong in ({"method": "divprune"}, 5, " "):
        with pytest.raises(ValueError, match="is a text like"):
            engine_text({"tokenprune": wrong})


@pytest.mark.parametrize("facts", [LLAVA, QWEN], ids=["llava", "qwen"])
@pytest.mark.parametrize("name", list_methods())
def test_every_method_runs_or_is_refused_with_a_sentence_and_keeps_the_number_it_says(name, facts):
    try:
        setting = read_setting(f"{name}@16", facts)
    except ValueError as error:
        assert len(str(error)) > 40 and str(error).endswith((".", "?")), error
        return
    for visual in (one_raster((6, 8)), Visual(tuple(Raster((4, 6), 24 * i, "frame") for i in range(3)), kind="video")):
        try_methods(setting, facts.tower, visual, 16)


def test_a_method_that_keeps_another_number_is_refused(monkeypatch):
    from tokenprune.methods.pool import Pool

    setting = read_setting("pool@17", LLAVA)
    monkeypatch.setattr(Pool, "exact_tokens", lambda self, rasters, budget: budget)
    with pytest.raises(ValueError, match="kept 16 of 48 tokens where it was asked for 17"):
        try_methods(setting, LLAVA.tower, one_raster((6, 8)), 16)


def test_pool_says_its_number_by_the_grid():
    setting = read_setting("pool@128", LLAVA)
    assert setting.length(setting.choice(None), PICTURE) == 121


@pytest.mark.parametrize("facts", [LLAVA, QWEN], ids=["llava", "qwen"])
def test_methods_keep_the_number_they_say_on_odd_grids_at_every_budget(facts):
    """Another number would be met in a worker, where nothing can be refused any more."""
    rasters = (Raster((3, 4), 0, "thumbnail"), Raster((5, 7), 12, "mosaic"))
    visuals = [one_raster((3, 7)), Visual(rasters, placeholders=52, offsets=torch.arange(47))]
    for name in list_methods():
        try:
            setting = read_setting(f"{name}@5", facts)
        except ValueError:
            continue
        for visual in visuals:
            for budget in range(1, visual.num_tokens, 4):
                try_methods(
                    dataclasses.replace(
                        setting, stages=[dataclasses.replace(setting.stages[0], budget=Budget(budget))]
                    ),
                    facts.tower,
                    visual,
                    8,
                )


def test_a_video_whose_ids_have_no_room_is_refused_in_front():
    family = FAMILIES["Qwen2_5_VLForConditionalGeneration"]
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    asked = {"video_grid_thw": [(400, 4, 4)], "second_per_grid_ts": [100.0]}
    with pytest.raises(ValueError, match="ends at the 3-D id 79800"):
        family.visuals(SimpleNamespace(vision_config=vision), "video", asked)
    asked["second_per_grid_ts"] = [10.0]
    assert len(family.visuals(SimpleNamespace(vision_config=vision), "video", asked)[0].rasters) == 400


def test_facts_of_a_tower_count_the_blocks_that_vllm_builds():
    class Vision:
        num_hidden_layers, num_attention_heads, hidden_size = 24, 16, 1024

    facts = vit_facts(Vision, 22, has_cls=True, decoder=32)
    assert (facts.blocks, facts.tower.feature_layer, facts.tower.num_layers) == (23, 22, 24)


def test_importing_tokenprune_never_touches_vllm():
    code = (
        "import sys; import tokenprune, tokenprune.vllm, tokenprune.vllm.settings, tokenprune.vllm.selection; "
        "tokenprune.apply; tokenprune.list_methods(); print('vllm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
