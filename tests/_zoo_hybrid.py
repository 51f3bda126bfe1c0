"""Families whose decoders mix attention with layers that go along the row: their state holds what came before."""

from __future__ import annotations

from typing import Any

import torch
from _zoo import END, IMAGE, START, TEXT, VIDEO, VIT, Batch, Rows, packed, zoo

Made = tuple[type, Any]
_QWEN = {
    "depth": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "patch_size": 4, "out_hidden_size": 48,
    "num_position_embeddings": 64,
}  # fmt: skip
_QWEN_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
_ALONG = {
    **TEXT, "head_dim": 12, "layer_types": ["linear_attention"] * 2 + ["full_attention", "linear_attention"],
    "linear_key_head_dim": 12, "linear_value_head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2], "mrope_interleaved": True,
        "partial_rotary_factor": 1.0,
    },
}  # fmt: skip
_MIXTURE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
_MERGED = {**VIT, "num_hidden_layers": 4, "image_size": 64, "patch_size": 4, "insert_layer_id": 1}


@zoo(packed())
def qwen3_5() -> Made:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    return Qwen3_5ForConditionalGeneration, Qwen3_5Config(vision_config=_QWEN, text_config=_ALONG, **_QWEN_IDS)


@zoo(packed())
def qwen3_5_moe() -> Made:
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    return Qwen3_5MoeForConditionalGeneration, Qwen3_5MoeConfig(
        vision_config=_QWEN, text_config={**_ALONG, **_MIXTURE}, **_QWEN_IDS
    )


def _side_by_side(rows: Rows) -> Batch:
    """Patches of all pictures in one strip, with their numbers of rows and columns (MiniCPM-V)."""
    shapes = [(4 * high, 4 * wide) for high, wide in rows.grids()]
    batch = rows.write([[IMAGE] * (high * wide // 16) for high, wide in shapes])
    strip = torch.cat([rows.pixels(1, 3, 4, high * wide * 4) for high, wide in shapes], dim=-1)
    return {**batch, "pixel_values": strip, "target_sizes": torch.tensor(shapes, dtype=torch.int32)}


@zoo(_side_by_side)
def minicpmv4_6() -> Made:
    from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

    return MiniCPMV4_6ForConditionalGeneration, MiniCPMV4_6Config(
        vision_config=_MERGED, text_config=Qwen3_5TextConfig(**_ALONG), image_token_id=IMAGE, video_token_id=VIDEO,
        insert_layer_id=1, image_size=32,
    )  # fmt: skip


def _marked(rows: Rows) -> Batch:
    """The same with what stands before and behind each picture, which places it on a canvas (MiniCPM-V 4.7)."""
    shapes = [(4 * high, 4 * wide) for high, wide in rows.grids()]
    batch = rows.write([[START] + [IMAGE] * (high * wide // 16) + [END] for high, wide in shapes])
    strip = torch.cat([rows.pixels(1, 3, 4, high * wide * 4) for high, wide in shapes], dim=-1)
    types = (batch["input_ids"] == IMAGE).long()
    sizes = torch.tensor(shapes, dtype=torch.int32)
    return {**batch, "pixel_values": strip, "target_sizes": sizes, "mm_token_type_ids": types}


@zoo(_marked)
def minicpmv4_7() -> Made:
    from transformers import MiniCPMV4_7Config, MiniCPMV4_7ForConditionalGeneration
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

    return MiniCPMV4_7ForConditionalGeneration, MiniCPMV4_7Config(
        vision_config=_MERGED, text_config=Qwen3_5TextConfig(**_ALONG), image_token_id=IMAGE, video_token_id=VIDEO,
        insert_layer_id=1, image_start_id=START, image_end_id=END, slice_start_id=61, slice_end_id=62, newline_id=63,
    )  # fmt: skip


@zoo(_side_by_side)
def minicpm_ocr() -> Made:
    from transformers import MiniCPMOcrConfig, MiniCPMOcrForConditionalGeneration
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

    return MiniCPMOcrForConditionalGeneration, MiniCPMOcrConfig(
        vision_config=_MERGED, text_config=Qwen3_5TextConfig(**_ALONG), image_token_id=IMAGE, video_token_id=VIDEO,
        insert_layer_id=1, downsample_mode="16x",
    )  # fmt: skip


@zoo(packed(types=False))
def lfm3_vl() -> Made:
    """Convolutions along the row beside windows."""
    from transformers import Lfm3Config, Lfm3VlConfig, Lfm3VlForConditionalGeneration

    kinds = ["conv", "conv", "full_attention", "sliding_attention"]
    text = Lfm3Config(**TEXT, head_dim=12, layer_types=kinds, sliding_window=20)
    vision = {**VIT, "num_key_value_heads": 2, "patch_size": 4, "layer_types": ["conv", "full_attention", "conv"]}
    return Lfm3VlForConditionalGeneration, Lfm3VlConfig(
        vision_config=vision, text_config=text, projector_hidden_size=64, **_QWEN_IDS
    )
