"""The sizes of the LLaVA-like families, read from their configs."""

from __future__ import annotations

from typing import Any

from tokenprune.cost import ModelShape


def llava_shape(config: Any, has_cls: bool) -> ModelShape:
    """CLIP or SigLIP tower, two-layer projector, Llama-like decoder."""
    vision, text = config.vision_config, config.get_text_config()
    width = text.hidden_size
    patches = (vision.image_size // vision.patch_size) ** 2
    return ModelShape(
        **vit_sizes(vision, vision.patch_size, patches, has_cls),
        projector=(vision.hidden_size, width, width),
        **text_sizes(text),
    )


def vit_sizes(vision: Any, patch: int, patches: int, has_cls: bool) -> dict[str, Any]:
    """The vision tower's part of a `ModelShape`; `patches` are those of one picture."""
    return {
        "vision_layers": vision.num_hidden_layers,
        "vision_blocks_run": vision.num_hidden_layers,
        "vision_hidden": vision.hidden_size,
        "vision_mlp": vision.intermediate_size,
        "vision_heads": vision.num_attention_heads,
        "patch": patch,
        "channels": vision.num_channels,
        "image_patches": patches,
        "has_cls": has_cls,
    }


def text_sizes(text: Any) -> dict[str, Any]:
    """The decoder's part of a `ModelShape`."""
    return {
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "intermediate": text.intermediate_size,
        "gated": True,
        "vocab": text.vocab_size,
    }
