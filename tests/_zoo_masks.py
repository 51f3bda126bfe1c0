"""Families whose decoders see otherwise than each token all before it: pictures that see themselves both ways, windows,
chunks, and layers that go along the row."""

from __future__ import annotations

from typing import Any

import torch
from _zoo import BREAK, END, IMAGE, START, TEXT, VIDEO, VIT, Batch, Rows, fixed, sized, zoo

Made = tuple[type, Any]
_VIT48 = {**VIT, "image_size": 48, "patch_size": 4, "vision_use_head": False}
_VIT24 = {**_VIT48, "image_size": 24}
_GEMMA = {**TEXT, "head_dim": 12, "num_hidden_layers": 6}

# --- pictures that see themselves in both directions ------------------------------------------------------------------


def _typed(count: int, side: int) -> Any:
    """Pictures of one size, and which tokens are theirs."""

    def write(rows: Rows) -> Batch:
        batch = fixed(count, side, around=(START, END))(rows)
        return {**batch, "token_type_ids": (batch["input_ids"] == IMAGE).long()}

    return write


def _gemma3(window: int) -> Made:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    thetas = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
    }
    text = Gemma3TextConfig(
        **_GEMMA, sliding_window=window, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=12, rope_parameters=thetas,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration, Gemma3Config(
        vision_config=SiglipVisionConfig(**_VIT48), text_config=text, mm_tokens_per_image=36, image_token_index=IMAGE,
        boi_token_index=START, eoi_token_index=END,
    )  # fmt: skip


@zoo(_typed(36, 48))
def gemma3() -> Made:
    """ShieldGemma 2 too, which is this class with another vocabulary."""
    return _gemma3(512)


@zoo(_typed(36, 48))
def gemma3_window() -> Made:
    return _gemma3(20)


def _prefix(rows: Rows) -> Batch:
    batch = fixed(36, 24)(rows)
    return {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}


@zoo(_prefix)
def paligemma() -> Made:
    from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

    return PaliGemmaForConditionalGeneration, PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**_VIT24), text_config=GemmaConfig(**{**TEXT, "head_dim": 12}),
        image_token_index=IMAGE, projection_dim=48, hidden_size=48, vocab_size=64,
    )  # fmt: skip


@zoo(_prefix, attention="eager")
def paligemma2() -> Made:
    from transformers import Gemma2Config, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

    text = Gemma2Config(
        **{**TEXT, "head_dim": 12}, sliding_window=20, layer_types=["sliding_attention", "full_attention"] * 2
    )
    return PaliGemmaForConditionalGeneration, PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**_VIT24), text_config=text, image_token_index=IMAGE, projection_dim=48,
        hidden_size=48, vocab_size=64,
    )  # fmt: skip


def _placed(rows: Rows) -> Batch:
    """Patches of each picture with their rows and columns, filled up with -1 (Gemma 4)."""
    grids = [(2 * high, 2 * wide) for high, wide in rows.grids()]
    batch = rows.write([[START] + [IMAGE] * (high * wide // 4) + [END] for high, wide in grids])
    most = max(high * wide for high, wide in grids)
    pixels, places = torch.zeros(len(grids), most, 48), torch.full((len(grids), most, 2), -1)
    for own, (high, wide) in enumerate(grids):
        pixels[own, : high * wide] = rows.pixels(high * wide, 48)
        across, down = torch.arange(wide).repeat(high), torch.arange(high).repeat_interleave(wide)
        places[own, : high * wide] = torch.stack([across, down], dim=-1)
    types = (batch["input_ids"] == IMAGE).long()
    return {**batch, "pixel_values": pixels, "image_position_ids": places, "mm_token_type_ids": types}


def _gemma4(window: int, **more: Any) -> Made:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig, Gemma4VisionConfig

    vision = Gemma4VisionConfig(
        **VIT, num_key_value_heads=4, head_dim=8, patch_size=4, pooling_kernel_size=2, position_embedding_size=64
    )
    text = Gemma4TextConfig(
        **_GEMMA, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2, sliding_window=window,
        use_bidirectional_attention="vision", global_head_dim=12, **more,
    )  # fmt: skip
    return Gemma4ForConditionalGeneration, Gemma4Config(
        text_config=text, vision_config=vision, audio_config=None, image_token_id=IMAGE, video_token_id=VIDEO,
        boi_token_id=START, eoi_token_id=END, audio_token_id=BREAK,
    )  # fmt: skip


@zoo(_placed)
def gemma4() -> Made:
    """Embeddings for each layer and place, and two layers that reuse keys of others."""
    shared = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 2}
    return _gemma4(512, **shared)


@zoo(_placed)
def gemma4_window() -> Made:
    return _gemma4(10, hidden_size_per_layer_input=8, vocab_size_per_layer_input=64, num_kv_shared_layers=2)


@zoo(_placed)
def gemma4_moe() -> Made:
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    alike = {"attention_k_eq_v": True, "num_global_key_value_heads": 2}
    return _gemma4(512, hidden_size_per_layer_input=0, **experts, **alike)


def _pooled(rows: Rows) -> Batch:
    """Patches of each picture, and which four of them make a token (Molmo 2)."""
    batch = rows.write([[IMAGE] * 9] * rows.total)
    corner = torch.arange(3)[:, None] * 12 + torch.arange(3) * 2
    cell = corner.flatten()[:, None] + torch.tensor([0, 1, 6, 7])  # [9, 4]
    return {
        **batch,
        "pixel_values": rows.pixels(rows.total, 36, 48),
        "image_token_pooling": torch.cat([cell + 36 * own for own in range(rows.total)]),
        "image_grids": torch.tensor([[3, 3, 0, 0]] * rows.total),
        "image_num_crops": torch.ones(rows.total, dtype=torch.int64),
        "mm_token_type_ids": (batch["input_ids"] == IMAGE).long(),
    }


@zoo(_pooled)
def molmo2() -> Made:
    from transformers import Molmo2Config, Molmo2ForConditionalGeneration

    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    vision = {**VIT, **heads, "image_size": [24, 24], "patch_size": 4, "num_position_embeddings": 36}
    pooling = {
        **heads, "vision_feature_layer": [-1, -2], "hidden_size": 32, "intermediate_size": 64, "text_hidden_size": 48,
    }  # fmt: skip
    text = {**TEXT, "head_dim": 12, "vocab_size": 60, "additional_vocab_size": 4}
    return Molmo2ForConditionalGeneration, Molmo2Config(
        vision_config=vision, adapter_config=pooling, text_config=text, image_start_token_id=61, image_end_token_id=62,
        image_patch_id=IMAGE, low_res_image_start_token_id=63, frame_start_token_id=BREAK, frame_end_token_id=2,
    )  # fmt: skip


# --- windows and chunks -----------------------------------------------------------------------------------------------


@zoo(sized(8))
def mistral3_window() -> Made:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    return Mistral3ForConditionalGeneration, Mistral3Config(
        vision_config=PixtralVisionConfig(**VIT, image_size=48, patch_size=4),
        text_config=MistralConfig(**TEXT, sliding_window=12), image_token_index=IMAGE, spatial_merge_size=2,
        vision_feature_layer=-1,
    )  # fmt: skip


@zoo(fixed(36, 48, around=(START, END)))
def cohere2_vision_window() -> Made:
    from transformers import (
        Cohere2Config,
        Cohere2VisionConfig,
        Cohere2VisionForConditionalGeneration,
        SiglipVisionConfig,
    )

    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    text = Cohere2Config(**TEXT, sliding_window=20, layer_types=kinds, logit_scale=1.0)
    return Cohere2VisionForConditionalGeneration, Cohere2VisionConfig(
        vision_config=SiglipVisionConfig(**_VIT48), text_config=text, image_token_id=IMAGE,
        alignment_intermediate_size=64,
    )  # fmt: skip


@zoo(fixed(36, 48, around=(START, END)))
def llama4() -> Made:
    """Chunks, and a layer that sees all without rotation."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration, modeling_outputs

    if not hasattr(modeling_outputs.MoeCausalLMOutputWithPast, "image_outputs"):  # 5.24 reads it, and fails without
        modeling_outputs.MoeCausalLMOutputWithPast.image_outputs = None  # type: ignore[attr-defined]
    vision = {
        **VIT, "intermediate_size": 128, "image_size": 48, "patch_size": 4, "vision_output_dim": 32,
        "projector_input_dim": 32, "projector_output_dim": 32, "pixel_shuffle_ratio": 0.5, "vision_feature_layer": -1,
    }  # fmt: skip
    text = {
        **TEXT, "head_dim": 12, "intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1, "attention_chunk_size": 16, "no_rope_layers": [1, 1, 1, 0], "use_qk_norm": True,
    }  # fmt: skip
    return Llama4ForConditionalGeneration, Llama4Config(
        vision_config=vision, text_config=text, image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END
    )


# --- layers that go along the row -------------------------------------------------------------------------------------


def _shaped(rows: Rows) -> Batch:
    """Patches of each picture in a frame of zeros, with their numbers of rows and columns (LFM2-VL)."""
    shapes = torch.tensor(rows.grids()) * 2
    counts = shapes.prod(1).tolist()
    batch = rows.write([[START] + [IMAGE] * (count // 4) + [END] for count in counts])
    pixels = torch.zeros(rows.total, max(counts), 48)
    real = torch.zeros(rows.total, max(counts), dtype=torch.int64)
    for own, count in enumerate(counts):
        pixels[own, :count], real[own, :count] = rows.pixels(count, 48), 1
    return {**batch, "pixel_values": pixels, "pixel_attention_mask": real, "spatial_shapes": shapes}


@zoo(_shaped)
def lfm2_vl() -> Made:
    from transformers import Lfm2Config, Lfm2VlConfig, Lfm2VlForConditionalGeneration, Siglip2VisionConfig

    text = Lfm2Config(**TEXT, layer_types=["conv", "conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False)
    vision = Siglip2VisionConfig(**VIT, num_patches=64, patch_size=4, vision_use_head=False)
    return Lfm2VlForConditionalGeneration, Lfm2VlConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, downsample_factor=2, projector_hidden_size=48
    )
