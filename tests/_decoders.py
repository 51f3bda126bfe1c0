"""Tiny LLaVAs with decoders of other layouts than Llama's: fused and renamed projections, norms elsewhere, partial and
interleaved rotation."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from _tiny import IMAGE, PAD, TEXT

_QUARTER = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_KINDS = ["sliding_attention", "full_attention"] * 2

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "phi3": ("Phi3Config", {}),
    "phi3 partial": ("Phi3Config", {"rope_parameters": _QUARTER}),
    "olmo2": ("Olmo2Config", {}),
    "glm": ("GlmConfig", {"head_dim": 12, "rope_parameters": _QUARTER}),
    "glm4": ("Glm4Config", {"head_dim": 12, "rope_parameters": _QUARTER}),
    "phi": ("PhiConfig", {"rope_parameters": _QUARTER}),
    "phi norms": ("PhiConfig", {"rope_parameters": _QUARTER, "qk_layernorm": True}),
    "gemma2": ("Gemma2Config", {"head_dim": 12, "layer_types": _KINDS}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 12, "layer_types": _KINDS, "query_pre_attn_scalar": 7}),
    "gpt_neox": ("GPTNeoXConfig", {"rope_parameters": _QUARTER}),
    "gpt_neox in turn": ("GPTNeoXConfig", {"rope_parameters": _QUARTER, "use_parallel_residual": False}),
    "cohere": ("CohereConfig", {"use_qk_norm": True}),
    "cohere2": ("Cohere2Config", {"layer_types": _KINDS}),
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 12}),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.4, "residual_multiplier": 0.7}),
    "starcoder2": ("Starcoder2Config", {}),
    "stablelm": ("StableLmConfig", {"rope_parameters": _QUARTER}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1, 0]}),
    "persimmon": ("PersimmonConfig", {"rope_parameters": _QUARTER}),
    "llama4": ("Llama4TextConfig", {"head_dim": 12, "num_local_experts": 2}),
    "bloom": ("BloomConfig", {"n_head": 4, "n_layer": 4}),
    "biogpt": ("BioGptConfig", {}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 2}),
    "gpt_oss": (
        "GptOssConfig",
        {"head_dim": 12, "num_local_experts": 2, "num_experts_per_tok": 2, "layer_types": _KINDS},
    ),
}


def llava_with(name: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """A LLaVA-1.5 with a 6 x 6 CLIP tower and the decoder of that name; weights so large that logits differ."""
    cls, more = DECODERS[name]
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=42, patch_size=7
    )
    text = getattr(transformers, cls)(**{**TEXT, **more})
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5 * 1.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)  # a norm's weights differ by channel
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model
