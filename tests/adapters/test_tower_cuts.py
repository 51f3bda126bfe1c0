"""Cuts inside towers of classes without a file of their own equal the masked model, whose attention hides the same
patches inside the tower and the same tokens behind it, in gradients too and with the masks of flash attention; what
does not verify is refused."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from _doubled import TOLERANCE as DOUBLE_TOLERANCE
from _doubled import double_batch, double_model, goes_along, in_double
from _masked_cells import features, masked_cells, patches_of_tokens, pixels
from _masked_whole import compare_whole
from _zoo import SPECIAL
from _zoo_all import zoo_batch, zoo_model
from masked_reference import run_pruned
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tokenprune
from tokenprune.api import adapter_for
from tokenprune.state.tower_recording import sources_of

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


ONCE = [{"at": "vision:0", "prune": "random", "keep": 3}]


def _features(adapter: Any, batch: dict[str, Tensor]) -> tuple[Any, list[Tensor]]:
    """What one features call made under a cut: its recording, and `[k, D]` of each picture, of the tokens kept."""
    output = adapter.entry.get_image_features(**pixels(batch), return_dict=True)
    recording, _ = sources_of(output)[0]
    ((_, alive),) = recording.work().cuts
    return recording, [rows[own] for rows, own in zip(adapter.feature_rows(output), alive)]


def test_gradients_inside_the_tower_equal_those_of_the_masked_tower() -> None:
    """Of weights before the cut and behind it."""
    model, batch = copy.deepcopy(zoo_model("paligemma")), zoo_batch("paligemma", "gradients", [2])
    adapter = adapter_for(model)
    weights = [block.self_attn.q_proj.weight for block in adapter.vision.blocks]
    found = []

    def gradients(kept: list[Tensor]) -> None:
        along = torch.randn(kept[0].shape, generator=torch.Generator().manual_seed(0))
        found.append(torch.autograd.grad(sum((own * along).sum() for own in kept), weights))

    with tokenprune.applied(model, ONCE):
        recording, kept = _features(adapter, batch)
        gradients(kept)
    patches = patches_of_tokens(adapter, adapter.vision.blocks[adapter.tower.feature_layer], batch)
    with masked_cells(adapter, [("image", recording.work())], patches):
        whole = adapter.feature_rows(adapter.entry.get_image_features(**pixels(batch), return_dict=True))
        gradients([rows[own] for rows, own in zip(whole, recording.work().cuts[0][1])])
    for mine, truth in zip(*found):
        assert float(truth.norm()) > 0
        assert float((mine - truth).norm() / truth.norm()) < 1e-4


def _flash_like(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any) -> Any:
    """What a flash function takes: no mask, or `[M, T]` of which rows are real."""
    assert attention_mask is None or attention_mask.shape == (query.shape[0], query.shape[2])
    seen.append(attention_mask)
    scores = query @ key.transpose(2, 3) * more.get("scaling", query.shape[-1] ** -0.5)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask.bool()[:, None, None], float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


seen: list[Any] = []


def test_pictures_that_keep_different_counts_get_the_masks_of_flash_attention() -> None:
    """SigLIP 2's tower, whose pictures are filled up: kept shares differ in patches, so rows are filled up as well."""
    model, batch = copy.deepcopy(zoo_model("lfm2_vl")), zoo_batch("lfm2_vl", "flash", [1, 2])
    adapter, half = adapter_for(model), [{"at": "vision:0", "prune": "random", "keep": 0.5}]
    with torch.no_grad(), tokenprune.applied(model, half):
        _, truth = _features(adapter, batch)
    assert len({len(own) for own in truth}) > 1
    ALL_ATTENTION_FUNCTIONS["flash_attention_like"] = _flash_like
    AttentionMaskInterface.register("flash_attention_like", flash_attention_mask)
    try:
        adapter.vision.module.config._attn_implementation = "flash_attention_like"
        with torch.no_grad(), tokenprune.applied(model, half):
            _, mine = _features(adapter, batch)
    finally:
        ALL_ATTENTION_FUNCTIONS.pop("flash_attention_like")
        AttentionMaskInterface._global_mapping.pop("flash_attention_like")
    assert any(mask is not None for mask in seen)
    for own, other in zip(mine, truth):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


# --- what does not verify ---------------------------------------------------------------------------------------------


def _refused(model: Any, why: str, method: Any = ONCE) -> None:
    with (
        tokenprune.applied(model, method),
        torch.no_grad(),
        pytest.raises(
            ValueError, match=f"has no tower cuts of this image: .*{why}.* Use a method that cuts at 'input'"
        ),
    ):
        model(**zoo_batch("paligemma", "refused", [1]))
    with torch.no_grad():
        assert features(adapter_for(model), zoo_batch("paligemma", "refused", [1])).isfinite().all(), "nothing is left"


def test_a_block_in_which_patches_see_their_neighbours_is_not_cut() -> None:
    model = copy.deepcopy(zoo_model("paligemma"))
    block = adapter_for(model).vision.blocks[1]
    forward = block.forward

    def blurred(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(hidden_states + hidden_states.roll(1, 1), *args, **kwargs)

    block.forward = blurred
    _refused(model, "taking patches out before block 1 is not hiding them from it")


def test_states_that_are_changed_between_blocks_are_not_cut() -> None:
    model = copy.deepcopy(zoo_model("paligemma"))
    blocks = adapter_for(model).vision.blocks
    blocks[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    _refused(model, "the states that block 0 leaves are changed before they enter block 1")


def test_without_the_trial_it_is_cut_all_the_same() -> None:
    model = copy.deepcopy(zoo_model("paligemma"))
    blocks = adapter_for(model).vision.blocks
    blocks[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    with torch.no_grad(), tokenprune.applied(model, ONCE, verify=False) as handle:
        model(**zoo_batch("paligemma", "refused", [1]))
        assert handle.report().kept_tokens == 3
