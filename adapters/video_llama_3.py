"""VideoLLaMA 3: its processor leaves out patches of a video that are as in the frame before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenprune.adapters._generic import Generic
from tokenprune.registry import register_model


@register_model("video_llama_3")
class VideoLlama3(Generic):
    """Stock `VideoLlama3ForConditionalGeneration`; its tower makes features of all patches, and which of them stand in
    the prompt is an argument that the features call is not given."""

    classes = ("VideoLlama3ForConditionalGeneration",)

    def check_call(self, call: Mapping[str, Any]) -> None:
        super().check_call(call)
        stays = call.get("video_compression_mask")
        if stays is not None and not bool(stays.all()):
            raise ValueError(
                f"The processor of {type(self.model).__name__} left out {int((~stays).sum())} of {stays.numel()} "
                "tokens of these videos, which is a pruning of its own. To prune them by a method instead, set "
                "processor.video_processor.use_token_compression to False."
            )
