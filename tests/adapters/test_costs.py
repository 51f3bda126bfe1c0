"""What a report says of every class that is read off its model equals what torch counts, or it says "not modelled": by
part, unpruned and pruned, at the prompt and in a decode step, and in the bytes of the real cache."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import pytest
import torch
from _zoo import Batch, Rows
from _zoo_all import FAMILIES, LACKS, zoo_model

from tokenprune import cost
from tokenprune.api import adapter_for, applied
from tokenprune.evals.profiling.flops import PARTS, TOLERANCE, cache_bytes, count_once
from tokenprune.report import Report
from tokenprune.seams import cache_in, with_cache

KEEP = 4
PLANS: dict[str, Any] = {
    "input": ("random", KEEP),
    "layer_2": ({"at": "layer:2", "prune": "random", "keep": KEEP}, None),
}
INSIDE = ({"at": "vision:0", "prune": "random", "keep": KEEP}, None)
"""A cut inside the tower, of which one family of each form of tower is counted."""
TOWER, PROJECTOR, DECODER = "vision", "projector", ("prefill", "decode")
UNMODELLED: dict[str, tuple[str, ...]] = {
    "apertus1p5": (TOWER, PROJECTOR),  # an encoder of convolutions
    "aria": (PROJECTOR,),  # cross-attention with learnt queries
    "chameleon": (TOWER, PROJECTOR, *DECODER),  # the decoder holds the encoder of pictures
    "deepseek_ocr2": (TOWER, PROJECTOR),  # SAM, and an encoder of queries
    "deepseek_vl_hybrid": (TOWER, PROJECTOR),  # two towers
    "dots3_note": (TOWER, PROJECTOR),  # experts in the tower
    "emu3": (TOWER, PROJECTOR),  # an encoder of convolutions
    "ernie4_5_vl_moe": (PROJECTOR, *DECODER),  # a resampler; experts for text and others for pictures
    "gemma4": (TOWER, *DECODER),  # patches pooled by their places; embeddings of places beside the rows
    "gemma4_moe": (TOWER, *DECODER),
    "gemma4_window": (TOWER, *DECODER),
    "fast_vlm": (TOWER, PROJECTOR),  # convolutions of timm
    "fuyu": (TOWER, PROJECTOR),  # no tower: patches of all pictures in one tensor
    "llama4": (TOWER, PROJECTOR),  # a shuffle and an adapter between tower and projector
    "gemma4_unified": (TOWER, PROJECTOR, *DECODER),  # no tower; logits of as many places as stay
    "got_ocr2": (TOWER, PROJECTOR),  # SAM
    "granite4_vision": (PROJECTOR,),  # several Q-Formers
    "granite_docling": (TOWER, PROJECTOR),  # a connector in the tower
    "hy_v4_vl": (TOWER, PROJECTOR, *DECODER),  # convolutions in the tower; several states a token
    "hunyuan_vl": (TOWER, PROJECTOR),  # convolutions in the tower
    "idefics2": (TOWER, PROJECTOR),  # pictures filled up; a perceiver
    "lfm2_vl": (TOWER, PROJECTOR),  # a tower for pictures of any size
    "lfm3_vl": (TOWER, PROJECTOR),  # convolutions in the tower
    "minicpm_ocr": (TOWER, PROJECTOR),  # pictures merged between its layers
    "minicpmv4_6": (TOWER, PROJECTOR),  # pictures merged between its layers
    "minicpmv4_7": (TOWER, PROJECTOR),  # pictures merged between its layers
    "molmo2": (TOWER, PROJECTOR),  # attention that pools
    "muse_glimmer": (TOWER, PROJECTOR),  # windows, and an adapter behind the tower
    "muse_spark": (TOWER, PROJECTOR),  # the same
    "ovis2": (TOWER, PROJECTOR),  # tokens that are shares of a vocabulary
    "perception_lm": (TOWER, PROJECTOR),  # a tower of timm
    "qwen2_5_omni_thinker": (TOWER, PROJECTOR),  # why they are not read was not found
    "step3p7": (TOWER, PROJECTOR),  # convolutions behind the tower
    "video_llama_3": (TOWER,),  # how many patches make a token is said by each call
    "video_llava": (TOWER, PROJECTOR),  # two towers
}
"""Parts by family, and why. All others are modelled, in all families."""
CELLS = [
    (name, plan) for name in FAMILIES for plan in PLANS if (name, plan) not in LACKS and plan != "vision_0"
]  # towers that are cut: `INSIDE`


@functools.cache
def one_prompt(name: str) -> Batch:
    """A row with two pictures: nothing is padded, which reports do not count."""
    rows = Rows(zlib.crc32(name.encode()))
    rows.pictures, rows.total = [2], 2
    return FAMILIES[name].write(rows)


@functools.cache
def counted_whole(name: str) -> dict[str, float]:
    """What torch counts of the unpruned model."""
    return count_once(adapter_for(zoo_model(name)), dict(one_prompt(name)))


def run(name: str, plan: str) -> tuple[Report, dict[str, float], list[int]]:
    """The report of a plan, what torch counts under it, and the bytes of each layer's cache."""
    method, keep = PLANS.get(plan, INSIDE)
    with torch.no_grad(), applied(zoo_model(name), method, keep=keep, verify=False) as handle:
        call = functools.partial(zoo_model(name), **one_prompt(name), use_cache=True)
        cache = cache_in(with_cache(call, adapter_for(zoo_model(name)).language_model.config))
        for _ in range(
            2 if plan == "inside" else 1
        ):  # the first finds out how pictures are laid out, which is not counted
            counted = count_once(adapter_for(zoo_model(name)), dict(one_prompt(name)))
        return handle.report(), counted, cache_bytes(cache)


def check(flops: cost.Flops, counted: dict[str, float], unmodelled: tuple[str, ...]) -> None:
    found = flops.as_dict()
    assert {part for part in PARTS if found[part] is None} == set(unmodelled)
    assert (found["total"] is None) == bool(unmodelled)
    off = {part: (found[part], counted[part]) for part in PARTS if found[part] is not None}
    assert all(mine == pytest.approx(torchs, rel=TOLERANCE) for mine, torchs in off.values()), off


@pytest.mark.parametrize(("name", "plan"), CELLS, ids=lambda value: value)
def test_every_part_equals_the_counter_or_is_not_modelled(name: str, plan: str) -> None:
    report, counted, held = run(name, plan)
    unmodelled = UNMODELLED.get(name, ())
    check(report.flops, counted, unmodelled)
    check(report.flops_unpruned, counted_whole(name), unmodelled)
    by_layer = [(mine, counted[f"layer:{layer}"]) for layer, mine in enumerate(report.flops_by_layer)]
    assert all(mine == pytest.approx(torchs, rel=TOLERANCE) for mine, torchs in by_layer if mine is not None), by_layer
    assert any(mine is None for mine, _ in by_layer) == ("prefill" in unmodelled)
    shape = adapter_for(zoo_model(name)).cost_shape()
    positions = report.tokens_by_layer[-1] if shape.all_logits else 1
    assert "prefill" in unmodelled or cost.head_flops(shape, positions) == counted["head"]
    assert report.kv_bytes == (None if "prefill" in unmodelled else sum(held))
    said = str(report)
    assert ("FLOPs to the first token  not modelled" in said) == bool(unmodelled)
    assert ("KV cache  not modelled" in said) == ("prefill" in unmodelled)


@pytest.mark.parametrize("name", ["gemma3", "glm4v", "mistral3", "vipllava"])
def test_what_leaves_inside_the_tower_is_not_counted(name: str) -> None:
    report, counted, _ = run(name, "inside")
    check(report.flops, counted, ())
    check(report.flops_unpruned, counted_whole(name), ())
    assert report.flops.vision < report.flops_unpruned.vision


def test_windows_that_patches_left_are_not_modelled() -> None:
    report, _, _ = run("exaone4_5", "inside")
    assert report.flops.vision is None and report.flops_unpruned.vision


def test_the_table_names_families_of_the_zoo() -> None:
    assert UNMODELLED.keys() <= FAMILIES.keys()
