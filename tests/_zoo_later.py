"""Families of later releases of transformers: layers without rotation among others of their kind, pictures without a
tower."""

from __future__ import annotations

from typing import Any

import torch
from _zoo import BREAK, END, EXPERTS, IMAGE, LATENT, START, TEXT, VIDEO, VIT, Batch, Rows, packed, zoo

Made = tuple[type, Any]
_QWEN = {
    "depth": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "patch_size": 4, "out_hidden_size": 48,
    "num_position_embeddings": 64,
}  # fmt: skip
_MUSE_VISION = {**VIT, "patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4}
_MUSE = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "out_hidden_size": 128, "projector_hidden_size": 40,
}  # fmt: skip
_MUSE_TEXT = {
    **TEXT, "head_dim": 12, "sliding_window": 20, "layer_rope_theta": [1e4, 1e4, 1e4, 0],
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
}  # fmt: skip
"""Of two layers of one kind, the first turns its queries and keys and the second does not."""


@zoo(packed(types=False))
def muse_glimmer() -> Made:
    from transformers import MuseGlimmerConfig, MuseGlimmerForConditionalGeneration

    config = MuseGlimmerConfig(vision_config=_MUSE_VISION, text_config=_MUSE_TEXT, **_MUSE)
    return MuseGlimmerForConditionalGeneration, config


@zoo(packed(types=False))
def muse_spark() -> Made:
    """The same decoder with experts."""
    from transformers import MuseSparkConfig, MuseSparkForConditionalGeneration

    experts = {
        "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_hidden_size": 24,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    }  # fmt: skip
    audio = {"patch_sizes": [4, 2], "hidden_sizes": [16, 16], "depths": [1, 1], "num_hidden_layers": 2}
    return MuseSparkForConditionalGeneration, MuseSparkConfig(
        vision_config=_MUSE_VISION, text_config={**_MUSE_TEXT, **experts}, audio_token_id=BREAK, **_MUSE,
        audio_config={**audio, "out_hidden_size": 48},
    )  # fmt: skip


@zoo(packed(moments=1, types=False))
def dots3_note() -> Made:
    """Layers that choose keys beside windows, both with keys from a latent. Heads that choose are many, because scores
    below 0 are cut off there: of few heads many keys have none, and which of them are chosen is their order's."""
    from transformers import Dots3NoteConfig, Dots3NoteForConditionalGeneration

    text = {
        **TEXT, **EXPERTS, **LATENT, "head_dim": 12, "shared_experts_intermediate_size": 32, "index_topk": 6,
        "index_head_dim": 8, "index_n_heads": 16, "sliding_window": 8,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
        "swa_head_dim": 12, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 12,
    }  # fmt: skip
    vision = {**VIT, "patch_size": 4, "mlp_layer_types": ["dense"] * 3, "adapter_in_dim": 32, "adapter_out_dim": 48}
    audio = {**VIT, "feature_size": 16, "downsample_hidden_size": 8, "adapter_input_size": 32, "adapter_out_dim": 48}
    return Dots3NoteForConditionalGeneration, Dots3NoteConfig(
        vision_config=vision, audio_config=audio, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
        audio_token_id=BREAK,
    )  # fmt: skip


@zoo(packed())
def cohere_compass() -> Made:
    """Windows with rotation, and layers that see all without; features of further depths are added in layers."""
    from transformers import CohereCompassConfig, CohereCompassForConditionalGeneration

    turned = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    text = {
        **TEXT, "sliding_window": 20, "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "rope_parameters": {"sliding_attention": turned, "full_attention": None}, "logit_scale": 1.0,
    }  # fmt: skip
    return CohereCompassForConditionalGeneration, CohereCompassConfig(
        vision_config={**_QWEN, "deepstack_visual_indexes": [0, 1]}, text_config=text, image_token_id=IMAGE,
        video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip


def _placed(rows: Rows) -> Batch:
    """Cells of each picture with their rows and columns, filled up with -1; a cell is a token (Gemma 4 Unified)."""
    grids, width = rows.grids(), 3 * 8 * 8
    batch = rows.write([[START] + [IMAGE] * (high * wide) + [END] for high, wide in grids])
    most = max(high * wide for high, wide in grids)
    pixels, places = torch.zeros(len(grids), most, width), torch.full((len(grids), most, 2), -1)
    for own, (high, wide) in enumerate(grids):
        pixels[own, : high * wide] = rows.pixels(high * wide, width)
        across, down = torch.arange(wide).repeat(high), torch.arange(high).repeat_interleave(wide)
        places[own, : high * wide] = torch.stack([across, down], dim=-1)
    types = (batch["input_ids"] == IMAGE).long()
    return {**batch, "pixel_values": pixels, "image_position_ids": places, "mm_token_type_ids": types}


@zoo(_placed)
def gemma4_unified() -> Made:
    """Without a tower; pictures see themselves both ways, in a window of fewer tokens than a prompt has."""
    from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

    text = {
        **TEXT, "head_dim": 12, "num_hidden_layers": 6, "global_head_dim": 12, "sliding_window": 10,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    }  # fmt: skip
    vision = {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 16}
    return Gemma4UnifiedForConditionalGeneration, Gemma4UnifiedConfig(
        text_config=text, vision_config={**vision, "output_proj_dims": 32}, audio_config=None, image_token_id=IMAGE,
        video_token_id=VIDEO, boi_token_id=START, eoi_token_id=END, audio_token_id=BREAK,
    )  # fmt: skip


def _crops(rows: Rows) -> Batch:
    """Pictures of their own sizes as a thumbnail and two tiles of 32 x 32 pixels, 4 x 4 tokens each, filled up as a
    mosaic; it is unpadded and has a token more behind each row (LLaVA-NeXT)."""
    shapes = {(32, 64): (4, 8), (64, 32): (8, 4), (20, 64): (2, 8)}  # (rows, cols) of the mosaic by size of the picture
    sizes = [list(shapes)[rows.below(3)] for _ in range(rows.total)]
    lengths = [16 + shapes[size][0] * (shapes[size][1] + 1) for size in sizes]
    batch = rows.write([[IMAGE] * length for length in lengths])
    pixels = rows.pixels(rows.total, 3, 3, 32, 32)
    return {**batch, "pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


@zoo(_crops)
def granite4_vision() -> Made:
    """Rows of pictures are empty, and features are added before layers, before and behind the cuts of most plans."""
    from transformers import Granite4VisionConfig, Granite4VisionForConditionalGeneration, SiglipVisionConfig

    text = {**TEXT, "embedding_multiplier": 12.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}
    tower = {**VIT, "hidden_size": 64, "image_size": 32, "patch_size": 4}  # heads of its Q-Former are 64 wide
    return Granite4VisionForConditionalGeneration, Granite4VisionConfig(
        vision_config=SiglipVisionConfig(**tower), text_config={**text, "num_hidden_layers": 6, "logits_scaling": 2.0},
        image_token_index=IMAGE, vision_feature_select_strategy="full", image_grid_pinpoints=[[32, 64], [64, 32]],
        downsample_rate="2/4", deepstack_layer_map=[[-3, 1], [-1, 0]], spatial_target_layers=[2, 3, 4, 5],
        qformer_config={
            "model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 48,
            "cross_attention_frequency": 1, "hidden_size": 64, "encoder_hidden_size": 64, "num_attention_heads": 1,
        },
    )  # fmt: skip
