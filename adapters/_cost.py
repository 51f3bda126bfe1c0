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


def generic_shape(config: Any, vision: Any, layers: int) -> ModelShape:
    """What configs of most families say; see `tokenprune.adapters._generic`."""
    text = config.get_text_config()
    hidden = text.hidden_size
    heads = _first(text, "num_attention_heads", default=1)
    width = _first(vision, "hidden_size", "embed_dim", "width", default=1)
    depth = _first(vision, "num_hidden_layers", "depth", "layers", "num_layers", default=1)
    return ModelShape(
        vision_layers=depth,
        vision_blocks_run=depth,
        vision_hidden=width,
        vision_mlp=_first(vision, "intermediate_size", "mlp_dim", default=4 * width),
        vision_heads=_first(vision, "num_attention_heads", "num_heads", "heads", default=1),
        patch=_first(vision, "patch_size", default=1),
        channels=_first(vision, "num_channels", "in_channels", default=3),
        image_patches=0,
        has_cls=False,
        projector=(width, hidden),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=_first(text, "num_key_value_heads", default=heads),
        head_dim=_first(text, "head_dim", default=hidden // heads),
        intermediate=_first(text, "intermediate_size", default=4 * hidden),
        gated=True,
        vocab=text.vocab_size,
    )


def _first(config: Any, *names: str, default: int) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value[0] if isinstance(value, (list, tuple)) else value)
    return default
