"""The sizes that decide what a model costs: from its config, and the decoder's from the modules that are loaded."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from tokenprune.adapters._layer_shapes import beside_layers, layer_shapes, width_of
from tokenprune.adapters._tower_cost import Projector
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


def read_off(shape: ModelShape, adapter: Any) -> ModelShape:
    """The same with decoder and head as they are loaded: layers of several kinds, experts, windows.

    Shards of a tensor-parallel model are not read: it is what the sizes say.
    """
    if (getattr(adapter.model, "tp_size", None) or 1) > 1:
        return shape
    decoder = adapter.language_model
    head, takes = width_of(adapter.head), inspect.signature(adapter.model.forward).parameters
    return dataclasses.replace(
        shape,
        by_layer=layer_shapes(adapter.layers, decoder.config),
        beside=beside_layers(decoder),
        vocab=None if head is None else head[1],
        all_logits="input_ids" in takes and "logits_to_keep" not in takes,
    )


def generic_shape(adapter: Any, projector: Projector) -> ModelShape:
    """Of a family that is read off its model; see `tokenprune.adapters._generic`.

    Args:
        projector: see `tokenprune.adapters._tower_cost`.
    """
    text = adapter.model.config.get_text_config()
    hidden, layers = text.hidden_size, len(adapter.layers)
    heads = first_of(text, "num_attention_heads", default=1)
    shape = ModelShape(
        projector=projector,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=first_of(text, "num_key_value_heads", default=heads),
        head_dim=first_of(text, "head_dim", default=hidden // heads),
        intermediate=first_of(text, "intermediate_size", default=0),
        gated=True,
        vocab=None,
        by_layer=(None,) * layers,
    )
    return read_off(shape, adapter)


def without_decoder(shape: ModelShape) -> ModelShape:
    """The same with a decoder that is not modelled."""
    return dataclasses.replace(shape, by_layer=(None,) * shape.layers)


def first_of(config: Any, *names: str, default: Any = None) -> Any:
    """The value of the first of some names that a config has, a part's after a dot (`vision_config.image_token_id`); of
    several values the first."""
    for name in names:
        value = config
        for part in name.split("."):
            value = getattr(value, part, None)
        if value is not None:
            return value[0] if isinstance(value, (list, tuple)) else value
    return default
