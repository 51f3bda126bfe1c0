"""Families whose towers are timm's, which needs torchvision: they run where both are installed."""

from __future__ import annotations

from typing import Any

from _zoo import IMAGE, TEXT, VIDEO, Batch, Rows, fixed, zoo

Made = tuple[type, Any]
NAMES = ("fast_vlm", "perception_lm")


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
    """Each picture is one crop, as in a batch of one-crop pictures (Perception LM)."""
    batch = fixed(9, 24)(rows)
    return {**batch, "pixel_values": batch["pixel_values"][:, None]}


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
