"""Qwen3-VL: features of several tower depths are added to visual tokens in the first decoder layers; time stamps.

The time stamps are text between the frames of a video. What is added is cut in step with the tokens. The additions come
after the first layers, so the decoder can be cut from the layer after them on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters._deepstack import deepstack_kwargs
from tokenprune.adapters._qwen import QwenVL
from tokenprune.adapters._vit import SIGLIP_PIXELS
from tokenprune.registry import register_model


@register_model("qwen3_vl")
class Qwen3VL(QwenVL):
    """Stock `Qwen3VLForConditionalGeneration`."""

    classes = ("Qwen3VLForConditionalGeneration",)
    timestamps = True
    pixel_facts = SIGLIP_PIXELS

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.first_cut = max(1, len(self.extra_mergers(model.config)))

    def extra_mergers(self, config: Any) -> Sequence[int]:
        return config.vision_config.deepstack_visual_indexes

    def expand_features(self, output: Any, expand: Callable[[Sequence[Tensor]], list[Tensor]]) -> None:
        sizes = [len(tokens) for tokens in output.pooler_output]
        super().expand_features(output, expand)
        # older transformers leave these unsplit
        output.deepstack_features = [
            torch.cat(expand(features.split(sizes))) if isinstance(features, Tensor) else expand(features)
            for features in output.deepstack_features
        ]

    def per_token_kwargs(
        self, kwargs: Mapping[str, Any], rows: Callable[[Tensor], Tensor], real: Tensor
    ) -> dict[str, Any]:
        return deepstack_kwargs(kwargs, rows, real)
