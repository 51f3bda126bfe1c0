"""LLaVA-1.5: CLIP tower with a [CLS] token, MLP projector, decoder with 1-D positions; one fixed grid per image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters._base import Adapter, Emit, decoder_of
from tokenprune.cost import ModelShape
from tokenprune.kernels.attention_rows import attention_rows
from tokenprune.registry import MODELS
from tokenprune.signals import CLS_ATTENTION, Signal, Tower


@MODELS.register("llava")
class Llava(Adapter):
    """Stock `LlavaForConditionalGeneration` with a CLIP vision tower."""

    classes = ("LlavaForConditionalGeneration",)

    def __init__(self, model: Any) -> None:
        config = model.config
        vision = config.vision_config
        if vision.model_type != "clip_vision_model":
            raise ValueError(
                f"The llava adapter covers CLIP vision towers; this model's tower is a {vision.model_type!r}."
            )
        if config.vision_feature_select_strategy != "default":
            raise ValueError(
                "vision_feature_select_strategy must be 'default' (patches only), got "
                f"{config.vision_feature_select_strategy!r}: a [CLS] token among the visual tokens has no place in "
                "the grid."
            )
        layer = config.vision_feature_layer
        if not isinstance(layer, int):
            raise ValueError(f"vision_feature_layer must be one layer, got {layer!r}; several have no common raster.")
        self.model = model
        self.entry = decoder_of(model, "model")
        self.language_model = decoder_of(model, "model.language_model")
        self.image_token_id = config.image_token_id
        self._vision_tower = decoder_of(model, "model.vision_tower")
        self._blocks: Any = decoder_of(self._vision_tower, "encoder.layers")
        self._patch = vision.patch_size
        depth = vision.num_hidden_layers
        # hidden_states has depth + 1 entries, the first being the embeddings; block l makes entry l + 1
        self.tower = Tower(
            num_layers=depth,
            feature_layer=(layer if layer >= 0 else depth + 1 + layer) - 1,
            has_cls=True,
            num_heads=vision.num_attention_heads,
            hidden_size=vision.hidden_size,
        )

    def image_grids(self, pixel_values: Tensor) -> list[tuple[int, int]]:
        rows, cols = (side // self._patch for side in pixel_values.shape[-2:])
        return [(rows, cols)] * pixel_values.shape[0]

    def check_signal(self, signal: Signal) -> None:
        if signal.name != CLS_ATTENTION:
            raise ValueError(f"The llava adapter records {CLS_ATTENTION!r}, not {signal.name!r}.")
        if not 0 <= signal.layer < self.tower.num_layers:
            raise ValueError(
                f"{signal.name} of vision block {signal.layer} was asked for; the tower has blocks "
                f"0 to {self.tower.num_layers - 1}."
            )

    def record(self, signal: Signal, emit: Emit) -> list[Any]:
        attention = self._blocks[signal.layer].self_attn
        seen: dict[str, Tensor] = {}

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # [M, H, N, d]

        def on_query(module: Any, args: Any, output: Tensor) -> None:
            seen["query"] = heads(output[:, :1].detach())

        def on_key(module: Any, args: Any, output: Tensor) -> None:
            seen["key"] = heads(output.detach())

        def on_done(module: Any, args: Any, output: Any) -> None:
            query, key = seen.pop("query"), seen.pop("key")
            emit(signal, lambda: attention_rows(query, key, attention.scale)[:, 0, 1:])  # [M, 1, 1 + N] -> [M, N]

        return [
            attention.q_proj.register_forward_hook(on_query),
            attention.k_proj.register_forward_hook(on_key),
            attention.register_forward_hook(on_done),
        ]

    def resize(self, pixel_values: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Mapping[str, Any]]:
        size = (grid[0] * self._patch, grid[1] * self._patch)
        small = torch.nn.functional.interpolate(
            pixel_values.float(), size=size, mode="bicubic", antialias=True, align_corners=False
        )
        return small.to(pixel_values.dtype), {"interpolate_pos_encoding": True}

    def cost_shape(self) -> ModelShape:
        vision, text = self.model.config.vision_config, self.model.config.get_text_config()
        width = text.hidden_size
        return ModelShape(
            vision_layers=vision.num_hidden_layers,
            vision_blocks_run=vision.num_hidden_layers,
            vision_hidden=vision.hidden_size,
            vision_mlp=vision.intermediate_size,
            vision_heads=vision.num_attention_heads,
            patch=vision.patch_size,
            channels=vision.num_channels,
            image_patches=(vision.image_size // vision.patch_size) ** 2,
            has_cls=True,
            projector=(vision.hidden_size, width, width),
            layers=text.num_hidden_layers,
            hidden=width,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or width // text.num_attention_heads,
            intermediate=text.intermediate_size,
            gated=True,
            vocab=text.vocab_size,
        )
