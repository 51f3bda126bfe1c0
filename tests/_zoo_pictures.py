"""Families whose towers take pictures of one size, pictures with sizes beside them, or tiles."""

from __future__ import annotations

from typing import Any

import torch
from _zoo import (
    BREAK,
    END,
    EXPERTS,
    IMAGE,
    LATENT,
    PAD,
    SAM,
    START,
    TEXT,
    VIDEO,
    VIT,
    Batch,
    Rows,
    fixed,
    sized,
    tiles,
    zoo,
)  # fmt: skip

Made = tuple[type, Any]
_MISTRAL = {**TEXT, "sliding_window": None}
_COHERE = {
    **TEXT, "sliding_window": 4096, "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "logit_scale": 1.0,
}  # fmt: skip
_VIT48 = {**VIT, "image_size": 48, "patch_size": 4}
_VIT24 = {**VIT, "image_size": 24, "patch_size": 4}


@zoo(sized(8))
def mistral3() -> Made:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    return Mistral3ForConditionalGeneration, Mistral3Config(
        vision_config=PixtralVisionConfig(**_VIT48), text_config=MistralConfig(**_MISTRAL), image_token_index=IMAGE,
        spatial_merge_size=2, tie_word_embeddings=False,
    )  # fmt: skip


@zoo(sized(8))
def mistral_large4() -> Made:
    from transformers import MistralLarge4Config, MistralLarge4ForConditionalGeneration, PixtralVisionConfig

    # each query chooses 8 keys, of rows that are longer; by so many heads that few scores are 0, and so alike
    chooses = {"first_k_dense_replace": 1, "index_topk": 8, "index_head_dim": 8, "index_n_heads": 16}
    return MistralLarge4ForConditionalGeneration, MistralLarge4Config(
        vision_config=PixtralVisionConfig(**_VIT48), text_config={**TEXT, **LATENT, **EXPERTS, **chooses},
        image_token_index=IMAGE, spatial_merge_size=2,
    )  # fmt: skip


@zoo(sized(8))
def lighton_ocr() -> Made:
    from transformers import LightOnOcrConfig, LightOnOcrForConditionalGeneration, PixtralVisionConfig, Qwen3Config

    return LightOnOcrForConditionalGeneration, LightOnOcrConfig(
        vision_config=PixtralVisionConfig(**_VIT48), text_config=Qwen3Config(**TEXT, head_dim=12),
        image_token_id=IMAGE, spatial_merge_size=2,
    )  # fmt: skip


@zoo(sized(4))
def llava_pixtral() -> Made:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig, PixtralVisionConfig

    return LlavaForConditionalGeneration, LlavaConfig(
        vision_config=PixtralVisionConfig(**_VIT48), text_config=MistralConfig(**_MISTRAL), image_token_index=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip


@zoo(fixed(36, 24))
def llava_siglip() -> Made:
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    return LlavaForConditionalGeneration, LlavaConfig(
        vision_config=SiglipVisionConfig(**_VIT24, vision_use_head=False), text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip


@zoo(fixed(36, 24))
def vipllava() -> Made:
    from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

    return VipLlavaForConditionalGeneration, VipLlavaConfig(
        vision_config=CLIPVisionConfig(**{**_VIT24, "num_hidden_layers": 4}), text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE, vision_feature_layers=[-2, -3],
    )  # fmt: skip


@zoo(fixed(36, 24))
def video_llava() -> Made:
    from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

    return VideoLlavaForConditionalGeneration, VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**{**_VIT24, "num_hidden_layers": 4}), text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE, video_token_index=VIDEO, vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip


@zoo(tiles(36, 48))
def idefics3() -> Made:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

    return Idefics3ForConditionalGeneration, Idefics3Config(
        vision_config=_VIT48, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD
    )


@zoo(tiles(16, 48))
def idefics2() -> Made:
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration, MistralConfig

    perceiver = {
        "resampler_n_latents": 16, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 16,
        "num_key_value_heads": 1, "hidden_size": 48,
    }  # fmt: skip
    return Idefics2ForConditionalGeneration, Idefics2Config(
        vision_config=_VIT48, text_config=MistralConfig(**_MISTRAL), perceiver_config=perceiver, image_token_id=IMAGE
    )


def _granite_docling(rows: Rows) -> Batch:
    batch = tiles(36, 48)(rows)
    return {**batch, "pixel_attention_mask": (batch["pixel_values"] != 0).flatten(2).any(-1)}


@zoo(_granite_docling)
def granite_docling() -> Made:
    from transformers import GraniteDoclingConfig, GraniteDoclingForConditionalGeneration

    tower = {"out_hidden_size": 48, "scale_factor": 2, "deepstack_visual_indexes": [0, 1], "use_fine_route": False}
    return GraniteDoclingForConditionalGeneration, GraniteDoclingConfig(
        vision_config={**_VIT48, **tower}, text_config=dict(TEXT), image_token_id=IMAGE, pad_token_id=PAD
    )


@zoo(fixed(36, 48, around=(START, END)))
def aya_vision() -> Made:
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration, Cohere2Config, SiglipVisionConfig

    return AyaVisionForConditionalGeneration, AyaVisionConfig(
        vision_config=SiglipVisionConfig(**_VIT48), text_config=Cohere2Config(**_COHERE), image_token_index=IMAGE,
        alignment_intermediate_size=64,
    )  # fmt: skip


@zoo(fixed(36, 48, around=(START, END)))
def cohere2_vision() -> Made:
    from transformers import (
        Cohere2Config,
        Cohere2VisionConfig,
        Cohere2VisionForConditionalGeneration,
        SiglipVisionConfig,
    )

    return Cohere2VisionForConditionalGeneration, Cohere2VisionConfig(
        vision_config=SiglipVisionConfig(**_VIT48), text_config=Cohere2Config(**_COHERE), image_token_id=IMAGE,
        alignment_intermediate_size=64,
    )  # fmt: skip


@zoo(fixed(36, 24))
def deepseek_vl() -> Made:
    from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration, LlamaConfig, SiglipVisionConfig

    return DeepseekVLForConditionalGeneration, DeepseekVLConfig(
        vision_config=SiglipVisionConfig(**_VIT24), text_config=LlamaConfig(**TEXT), image_token_id=IMAGE
    )


def _deepseek_vl_hybrid(rows: Rows) -> Batch:
    return {**fixed(36, 24)(rows), "high_res_pixel_values": rows.pixels(rows.total, 3, 128, 128)}


@zoo(_deepseek_vl_hybrid)
def deepseek_vl_hybrid() -> Made:
    from transformers import (
        DeepseekVLHybridConfig,
        DeepseekVLHybridForConditionalGeneration,
        LlamaConfig,
        SamVisionConfig,
        SiglipVisionConfig,
    )

    return DeepseekVLHybridForConditionalGeneration, DeepseekVLHybridConfig(
        vision_config=SiglipVisionConfig(**_VIT24), image_token_id=IMAGE,
        high_res_vision_config=SamVisionConfig(**SAM, output_channels=16, image_size=128, patch_size=8),
        text_config=LlamaConfig(**TEXT),
    )  # fmt: skip


@zoo(fixed(36, 24))
def janus() -> Made:
    from transformers import JanusConfig, JanusForConditionalGeneration
    from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

    sizes = {name: value for name, value in _VIT24.items() if name != "intermediate_size"}
    drawn = JanusVQVAEConfig(
        embed_dim=8, num_embeddings=16, latent_channels=8, base_channels=32, channel_multiplier=[1, 1],
        num_res_blocks=1, projection_dim=48, num_patches=6, image_token_embed_dim=48,
    )  # fmt: skip
    return JanusForConditionalGeneration, JanusConfig(
        vision_config=JanusVisionConfig(**sizes, projection_dim=48, mlp_ratio=2, num_image_tokens=36), vq_config=drawn,
        text_config={"model_type": "llama", **TEXT}, image_token_id=IMAGE,
    )  # fmt: skip


@zoo(fixed(36, 24, around=(60, 61)))
def ovis2() -> Made:
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Qwen2Config
    from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig

    vision = Ovis2VisionConfig(
        **{**_VIT24, "patch_size": 2}, vocab_size=24, num_visual_indicator_tokens=4, hidden_stride=2,
        tokenize_function="softmax",
    )  # fmt: skip
    return Ovis2ForConditionalGeneration, Ovis2Config(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE, hidden_size=48, vocab_size=64,
        visual_indicator_token_ids=[60, 61, 62, 63],
    )  # fmt: skip


@zoo(fixed(16, 64), attention="eager")
def got_ocr2() -> Made:
    from transformers import GotOcr2Config, GotOcr2ForConditionalGeneration, Qwen2Config
    from transformers.models.got_ocr2.configuration_got_ocr2 import GotOcr2VisionConfig

    return GotOcr2ForConditionalGeneration, GotOcr2Config(
        vision_config=GotOcr2VisionConfig(**SAM, output_channels=12, image_size=64, patch_size=4),
        text_config=Qwen2Config(**TEXT), image_token_index=IMAGE, image_seq_length=16,
    )  # fmt: skip


@zoo(fixed(145, 96), attention="eager")
def deepseek_ocr2() -> Made:
    from transformers import DeepseekOcr2Config, DeepseekOcr2ForConditionalGeneration

    sam = {**SAM, "output_channels": 16, "image_size": 96, "patch_size": 4, "downsample_channels": [24, 32]}
    del sam["num_pos_feats"]
    encoder = {**VIT, "num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    layers = ["dense", "sparse", "sparse", "sparse"]
    text = {**TEXT, **EXPERTS, "mlp_layer_types": layers, "max_position_embeddings": 2048}
    return DeepseekOcr2ForConditionalGeneration, DeepseekOcr2Config(
        vision_config={"sam_config": sam, "encoder_config": encoder}, text_config=text, image_token_id=IMAGE
    )


@zoo(fixed(16, 24))
def aria() -> Made:
    from transformers import AriaConfig, AriaForConditionalGeneration
    from transformers.models.aria.configuration_aria import AriaTextConfig
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

    return AriaForConditionalGeneration, AriaConfig(
        vision_config=Idefics3VisionConfig(**_VIT24), image_token_index=IMAGE, vision_feature_layer=-1,
        text_config=AriaTextConfig(**TEXT, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        projector_patch_to_query_dict={36: 16},
    )  # fmt: skip


@zoo(fixed(36, 48))
def qianfan_ocr() -> Made:
    from transformers import QianfanOCRConfig, QianfanOCRForConditionalGeneration, Qwen3Config

    return QianfanOCRForConditionalGeneration, QianfanOCRConfig(
        vision_config={**VIT, "image_size": [48, 48], "patch_size": [4, 4]}, image_token_id=IMAGE,
        text_config=Qwen3Config(**TEXT, head_dim=12), image_seq_length=36,
    )  # fmt: skip


@zoo(fixed(9, 48))
def step3p7() -> Made:
    from transformers import Step3p7Config, Step3p7ForConditionalGeneration

    bases = {"full_attention": 1e6, "sliding_attention": 1e2}
    text = {
        **TEXT, "head_dim": 12, "sliding_window": 512, "num_sliding_attention_heads": 4, "n_routed_experts": 4,
        "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "share_expert_dim": 32,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()},
    }  # fmt: skip
    return Step3p7ForConditionalGeneration, Step3p7Config(
        vision_config={**_VIT48, "max_position_embeddings": 144}, text_config=text, image_token_id=IMAGE
    )


def _filled_up(rows: Rows) -> Batch:
    """Pictures as a thumbnail and tiles of 24 x 24 pixels, 3 x 3 tokens each, and how much of the tiles is picture; in
    a batch with larger ones they are filled up with tiles of zeros (Phi-4 Multimodal)."""
    shapes = [((1, 1), (6, 6)), ((1, 2), (6, 9)), ((2, 1), (7, 4)), ((2, 2), (10, 12))]  # tiles; patches of picture
    found = [shapes[rows.below(4)] for _ in range(rows.total)]
    most = 1 + max(high * wide for (high, wide), _ in found)
    pixels, masks, lengths = torch.zeros(rows.total, most, 3, 24, 24), torch.ones(rows.total, most, 6, 6), []
    for own, ((high, wide), (down, across)) in enumerate(found):
        tiles = high * wide
        pixels[own, : 1 + tiles] = rows.pixels(1 + tiles, 3, 24, 24)
        whole = torch.zeros(6 * high, 6 * wide)
        whole[:down, :across] = 1
        masks[own, 1 : 1 + tiles] = whole.view(high, 6, wide, 6).transpose(1, 2).reshape(tiles, 6, 6)
        lengths.append(-(-down // 2) * (-(-across // 2) + 1) + 1 + 3 * 4)
    batch = rows.write([[IMAGE] * length for length in lengths])
    sizes = torch.tensor([[24 * high, 24 * wide] for (high, wide), _ in found])
    return {**batch, "image_pixel_values": pixels, "image_sizes": sizes, "image_attention_mask": masks}


@zoo(_filled_up)
def phi4_multimodal() -> Made:
    """The decoder merges by itself, and turns half of each head."""
    from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

    audio = {
        "hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2, "input_size": 8,
        "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 8, "time_reduction": 2,
        "bias_max_distance": 8, "audio_token_id": BREAK,
    }  # fmt: skip
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    factors = {"short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 3.0, 4.0]}
    return Phi4MultimodalForCausalLM, Phi4MultimodalConfig(
        **TEXT, vision_config={**_VIT24, "crop_size": 24, "image_token_id": IMAGE}, audio_config=audio,
        rope_parameters={**rope, **factors}, original_max_position_embeddings=512,
    )  # fmt: skip
