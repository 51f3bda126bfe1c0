"""Cuts inside towers of classes without a file of their own equal the masked model, whose attention hides the same
patches inside the tower and the same tokens behind it; and what does not verify is refused."""

from __future__ import annotations

import contextlib

import pytest
from _doubled import TOLERANCE as DOUBLE_TOLERANCE
from _doubled import double_batch, double_model, goes_along, in_double
from _masked_whole import compare_whole
from _zoo import SPECIAL
from _zoo_all import zoo_batch, zoo_model
from masked_reference import run_pruned

SILENT = [token for token in SPECIAL if token < 64]
TWICE = [{"at": "vision:0", "prune": "random", "keep": 5}, {"at": "layer:2", "prune": "random", "keep": 3}]
CUT = {
    "gemma3": "flowcut",  # SigLIP, patches pooled
    "paligemma": TWICE,  # SigLIP, a token a patch
    "vipllava": "flowcut",  # CLIP: [CLS], features of two blocks
    "aya_vision": "flowcut",  # SigLIP, pixel shuffle
    "qianfan_ocr": "flowcut",  # [CLS], pixel shuffle, blocks that take no mask
    "mistral3": "flowcut",  # Pixtral: pictures of any size, in one row under one mask
    "lfm2_vl": TWICE,  # SigLIP 2: pictures filled up
    "qwen3_5": "flowcut(text_stage=false)",  # patches by cell, in one row
    "glm4v": "flowcut",
    "kimi_k25": TWICE,
    "qwen3_vl_moe": "pixelprune",  # features of several blocks, before the first of which cells leave
    "exaone4_5": "flowcut",  # sorted by windows, keys shared by heads
}
"""Families by the kind of their tower, and what cuts inside it."""


@pytest.mark.parametrize("name", list(CUT))
def test_removal_inside_the_tower_equals_masking(name: str) -> None:
    plan, batch = CUT[name], zoo_batch(name, "cuts", [1, 2])
    keep = 2 if isinstance(plan, str) else None
    along = goes_along(name)
    with in_double() if along else contextlib.nullcontext():
        model = double_model(name) if along else zoo_model(name)
        batch = double_batch(batch) if along else batch
        run = run_pruned(model, plan, keep, batch, tokens=4, silent=SILENT)
        assert any(work.cuts for _, work in run["tower"])
        compare_whole(run, batch, DOUBLE_TOLERANCE if along else 1e-5, SILENT)
    assert run["report"].kept_tokens < run["report"].visual_tokens
