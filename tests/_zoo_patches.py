"""Families whose towers take pictures of any size as packed patches, most with positions of rows and columns."""

from __future__ import annotations

from typing import Any

import torch
from _zoo import BREAK, END, EXPERTS, IMAGE, LATENT, PAD, START, TEXT, VIDEO, VIT, Batch, Rows, packed, zoo

Made = tuple[type, Any]
_TURNS: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
_WOVEN = {**_TURNS, "mrope_interleaved": True}
_WHOLE = {**_TURNS, "partial_rotary_factor": 1.0}
_BLOCKS = {"depth": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "patch_size": 4}
_QWEN = {**_BLOCKS, "out_hidden_size": 48}
_QWEN3 = {**_QWEN, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
_WINDOWS = {**_QWEN, "window_size": 16, "fullatt_block_indexes": [1]}
_GLM = {**_QWEN, "image_size": 48}
_KINDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_QWEN_IDS = {**_KINDS, "vision_start_token_id": START, "vision_end_token_id": END}
_GLM_IDS = {
    **_KINDS, "image_start_token_id": START, "image_end_token_id": END, "video_start_token_id": BREAK,
    "video_end_token_id": 2,
}  # fmt: skip
_MIXTURE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip
_AUDIO = {
    "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 16,
    "output_dim": 48,
}  # fmt: skip
_GLM_TEXT = {**TEXT, "rope_parameters": _WHOLE}
_QWEN3_TEXT = {**TEXT, "head_dim": 12, "rope_parameters": _WOVEN}


@zoo(packed())
def glm4v() -> Made:
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    return Glm4vForConditionalGeneration, Glm4vConfig(vision_config=_GLM, text_config=_GLM_TEXT, **_GLM_IDS)


@zoo(packed())
def glm46v() -> Made:
    from transformers import Glm4vConfig, Glm46VConfig, Glm46VForConditionalGeneration

    parts = Glm4vConfig(vision_config=_GLM, text_config=_GLM_TEXT)
    config = Glm46VConfig(vision_config=parts.vision_config, text_config=parts.text_config, **_GLM_IDS)
    return Glm46VForConditionalGeneration, config


@zoo(packed())
def glm_ocr() -> Made:
    from transformers import GlmOcrConfig, GlmOcrForConditionalGeneration

    return GlmOcrForConditionalGeneration, GlmOcrConfig(vision_config=_GLM, text_config=_GLM_TEXT, **_GLM_IDS)


@zoo(packed())
def glm4v_moe() -> Made:
    from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

    text = {**_GLM_TEXT, **EXPERTS, "head_dim": 12, "first_k_dense_replace": 1}
    return Glm4vMoeForConditionalGeneration, Glm4vMoeConfig(vision_config=_GLM, text_config=text, **_GLM_IDS)


@zoo(packed())
def qwen3_vl_moe() -> Made:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    config = Qwen3VLMoeConfig(vision_config=_QWEN3, text_config={**_QWEN3_TEXT, **_MIXTURE}, **_QWEN_IDS)
    return Qwen3VLMoeForConditionalGeneration, config


@zoo(packed(types=False))
def qwen2_5_omni_thinker() -> Made:
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig

    return Qwen2_5OmniThinkerForConditionalGeneration, Qwen2_5OmniThinkerConfig(
        vision_config=_WINDOWS, audio_config=_AUDIO, text_config={**TEXT, "rope_parameters": _TURNS},
        image_token_index=IMAGE, video_token_index=VIDEO, audio_token_index=BREAK, vision_start_token_id=START,
        vision_end_token_id=END, audio_start_token_id=61, audio_end_token_id=62, position_id_per_seconds=25,
        pad_token_id=PAD,
    )  # fmt: skip


@zoo(packed(types=False))
def qwen3_omni_moe_thinker() -> Made:
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

    return Qwen3OmniMoeThinkerForConditionalGeneration, Qwen3OmniMoeThinkerConfig(
        vision_config=_QWEN3, audio_config={**_AUDIO, "downsample_hidden_size": 32},
        text_config={**_QWEN3_TEXT, **_MIXTURE}, **_QWEN_IDS, audio_token_id=BREAK, audio_start_token_id=61,
        position_id_per_seconds=13, pad_token_id=PAD,
    )  # fmt: skip


def _video_llama_3(rows: Rows) -> Batch:
    batch = packed(moments=1, types=False)(rows)
    return {**batch, "image_merge_sizes": torch.full((rows.total,), 2)}


@zoo(_video_llama_3)
def video_llama_3() -> Made:
    from transformers import Qwen2Config, VideoLlama3Config, VideoLlama3ForConditionalGeneration

    return VideoLlama3ForConditionalGeneration, VideoLlama3Config(
        vision_config={**VIT, "patch_size": 4}, text_config=Qwen2Config(**TEXT), **_KINDS
    )


@zoo(packed(moments=1, unfolded=True))
def paddleocr_vl() -> Made:
    from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

    return PaddleOCRVLForConditionalGeneration, PaddleOCRVLConfig(
        vision_config={**VIT, "image_size": 24, "patch_size": 4},
        text_config={**TEXT, "head_dim": 12, "rope_parameters": _TURNS}, **_QWEN_IDS,
    )  # fmt: skip


def _ernie(rows: Rows) -> Batch:
    batch = packed(moments=1)(rows)
    return {**batch, "moe_mm_token_type_ids": batch["mm_token_type_ids"]}


@zoo(_ernie)
def ernie4_5_vl_moe() -> Made:
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    text = {
        **TEXT, "rope_parameters": _TURNS, "moe_intermediate_size": [32, 24], "moe_k": 2, "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
    }  # fmt: skip
    return Ernie4_5_VLMoeForConditionalGeneration, Ernie4_5_VLMoeConfig(
        vision_config={**_BLOCKS, "temporal_merge_size": 2}, text_config=text, **_GLM_IDS
    )


@zoo(packed(moments=1, unfolded=True, types=False))
def kimi_k25() -> Made:
    from transformers import DeepseekV3Config, Kimi_K25Config, Kimi_K25ForConditionalGeneration

    return Kimi_K25ForConditionalGeneration, Kimi_K25Config(
        vision_config={**VIT, "patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8}, projection_hidden_size=32,
        text_config=DeepseekV3Config(**{**TEXT, **LATENT, **EXPERTS}, first_k_dense_replace=1), **_QWEN_IDS,
    )  # fmt: skip


@zoo(packed(types=False))
def hyperclovax_vision_v2() -> Made:
    from transformers import HyperCLOVAXConfig, HyperCLOVAXVisionV2Config, HyperCLOVAXVisionV2ForConditionalGeneration
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    return HyperCLOVAXVisionV2ForConditionalGeneration, HyperCLOVAXVisionV2Config(
        vision_config=Qwen2_5_VLVisionConfig(**_WINDOWS), text_config=HyperCLOVAXConfig(**TEXT), **_KINDS
    )


@zoo(packed(types=False))
def exaone4_5() -> Made:
    from transformers import Exaone4_5_Config, Exaone4_5_ForConditionalGeneration, Exaone4Config

    return Exaone4_5_ForConditionalGeneration, Exaone4_5_Config(
        vision_config={**_WINDOWS, "num_key_value_heads": 2}, **_KINDS,
        text_config=Exaone4Config(**TEXT, sliding_window=512, sliding_window_pattern=4),
    )  # fmt: skip


@zoo(packed(moments=1))
def cosmos3_edge() -> Made:
    from transformers import Cosmos3EdgeConfig, Cosmos3EdgeForConditionalGeneration

    return Cosmos3EdgeForConditionalGeneration, Cosmos3EdgeConfig(
        vision_config={**VIT, "patch_size": 4, "num_patches": 64}, text_config=_QWEN3_TEXT, projector_hidden_size=64,
        **_QWEN_IDS,
    )  # fmt: skip


@zoo(packed())
def cosmos3_omni() -> Made:
    from transformers import Cosmos3OmniConfig, Cosmos3OmniForConditionalGeneration
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig

    return Cosmos3OmniForConditionalGeneration, Cosmos3OmniConfig(
        vision_config=Qwen3VLVisionConfig(**_QWEN3), text_config=Qwen3VLTextConfig(**_QWEN3_TEXT), **_QWEN_IDS
    )


@zoo(packed(moments=1, count=lambda high, wide: high * (wide + 1) + 2))
def hunyuan_vl() -> Made:
    from transformers import HunYuanVLConfig, HunYuanVLForConditionalGeneration

    vision = {
        **VIT, "patch_size": 4, "out_hidden_size": 48, "text_hidden_size": 48, "max_image_size": 64,
        "min_image_size": 8, "img_max_token_num": 64,
    }  # fmt: skip
    rope = {
        "rope_type": "xdrope", "rope_theta": 1e4, "mrope_section": [2, 2, 1, 1], "xdrope_section": [2, 2, 1, 1],
        "alpha": 1.0, "factor": 1.0,
    }  # fmt: skip
    return HunYuanVLForConditionalGeneration, HunYuanVLConfig(
        vision_config=vision, text_config={**TEXT, "head_dim": 12, "rope_parameters": rope}, image_token_id=IMAGE,
        im_start_id=START, im_end_id=END, im_newline_id=BREAK,
    )  # fmt: skip
