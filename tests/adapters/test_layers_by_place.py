"""Decoders whose layers count places of the row are refused by the kind of their layers."""

from __future__ import annotations

import pytest
import torch
from _tiny import TEXT
from _zoo import IMAGE, VIDEO, VIT

import tokenprune


def _minimax(kinds: list[str]) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "MiniMaxM3VLConfig"):
        pytest.skip("this transformers has no MiniMax M3")
    text = {
        **TEXT, "head_dim": 12, "rotary_dim": 12, "intermediate_size": 32, "dense_intermediate_size": 64,
        "shared_intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "index_n_heads": 2,
        "index_head_dim": 12, "index_block_size": 4, "index_topk_blocks": 2, "layer_types": kinds,
    }  # fmt: skip
    vision = {**VIT, "patch_size": 4, "image_size": 48}
    config = transformers.MiniMaxM3VLConfig(
        vision_config=vision, text_config=text, projector_hidden_size=40, image_token_index=IMAGE,
        video_token_index=VIDEO,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.MiniMaxM3SparseForConditionalGeneration(config).eval()


def test_layers_that_choose_blocks_of_places_are_refused() -> None:
    """As in the released model; the same class with layers that see all of a row passes."""
    model = _minimax(["full_attention", "minimax_m3_sparse"] * 2)
    for verify in (True, False):
        with pytest.raises(ValueError, match="MiniMaxM3VLTextModel has layers of the kind minimax_m3_sparse"):
            tokenprune.apply(model, "random", keep=4, verify=verify)
    tokenprune.apply(_minimax(["full_attention"] * 4), "random", keep=4).remove()
