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

    vision = {**VIT, "num_hidden_layers": 4, "image_size": 64, "patch_size": 4, "insert_layer_id": 1}
    return MiniCPMV4_6ForConditionalGeneration, MiniCPMV4_6Config(
        vision_config=vision, text_config=Qwen3_5TextConfig(**_ALONG), image_token_id=IMAGE, video_token_id=VIDEO,
        insert_layer_id=1, image_size=32,
    )  # fmt: skip
