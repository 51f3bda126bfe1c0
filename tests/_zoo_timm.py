"""Families whose towers are timm's, which needs torchvision: they run where both are installed."""

from __future__ import annotations

from typing import Any

from _zoo import BREAK, IMAGE, TEXT, VIDEO, Batch, Rows, fixed, zoo

Made = tuple[type, Any]
NAMES = ("fast_vlm", "gemma3n", "perception_lm")


@zoo(fixed(16, 128))
def fast_vlm() -> Made:
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration, Qwen2Config, TimmWrapperConfig

    vision = TimmWrapperConfig(
        architecture="fastvit_t8", do_pooling=True, global_pool="avg", hidden_size=512, num_classes=0,
        model_args={"layers": (1, 1, 1, 1), "embed_dims": (32, 64, 128, 256), "inference_mode": True},
    )  # fmt: skip
    return FastVlmForConditionalGeneration, FastVlmConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_index=IMAGE
    )


def _crops(rows: Rows) -> Batch:
    """Each picture is one crop, or a thumbnail and two tiles; all of a batch are alike in that (Perception LM)."""
    tiles = 1 + 2 * rows.below(2)
    batch = fixed(9 * tiles, 24)(rows)
    return {**batch, "pixel_values": rows.pixels(rows.total, tiles, 3, 24, 24)}


@zoo(_crops)
def perception_lm() -> Made:
    from transformers import LlamaConfig, PerceptionLMConfig, PerceptionLMForConditionalGeneration, TimmWrapperConfig

    tower = {
        "embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": [24, 24], "patch_size": 4, "global_pool": "",
        "ref_feat_shape": [6, 6],
    }  # fmt: skip
    vision = TimmWrapperConfig(architecture="vit_pe_core_tiny_patch16_384", num_classes=0, model_args=tower)
    return PerceptionLMForConditionalGeneration, PerceptionLMConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), vision_use_cls_token=True, projector_pooling_ratio=2,
        image_token_id=IMAGE, video_token_id=VIDEO,
    )  # fmt: skip


@zoo(fixed(16, 128))
def gemma3n() -> Made:
    """Embeddings for each layer and place, several states of each token, and layers that reuse keys of others."""
    from transformers import Gemma3nConfig, Gemma3nForConditionalGeneration
    from transformers.models.gemma3n.configuration_gemma3n import Gemma3nTextConfig, Gemma3nVisionConfig

    vision = Gemma3nVisionConfig(
        architecture="fastvit_t8", hidden_size=512, vocab_size=2, vocab_offset=64, num_classes=0, do_pooling=False,
        model_args={"layers": (1, 1, 1, 1), "embed_dims": (32, 64, 128, 256), "inference_mode": True},
    )  # fmt: skip
    text = Gemma3nTextConfig(
        **{**TEXT, "head_dim": 12, "num_hidden_layers": 6, "intermediate_size": 64}, sliding_window=10,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
        vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2,
        activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
    )  # fmt: skip
    audio = {
        "hidden_size": 16, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2, "vocab_offset": 66,
        "sscp_conv_channel_size": [8, 4], "input_feat_size": 16, "vocab_size": 2,
    }  # fmt: skip
    return Gemma3nForConditionalGeneration, Gemma3nConfig(
        text_config=text, vision_config=vision, audio_config=audio, image_token_id=IMAGE, audio_token_id=BREAK,
        vision_soft_tokens_per_image=16,
    )  # fmt: skip
