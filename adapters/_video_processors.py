"""Video processors of transformers that prepare a video as its frames would be prepared one by one, by name: a stand-in
can take the place of these where torchvision, which all of them need, is not installed."""

from __future__ import annotations

BY_FRAME = frozenset(
    {
        "InternVLVideoProcessor",
        "LlavaNextVideoVideoProcessor",
        "LlavaOnevisionVideoProcessor",
        "Qwen2VLVideoProcessor",
        "SmolVLMVideoProcessor",
    }
)
"""Limits in pixels are for each frame. Checkpoints that name no video processor are older than all others."""

WHOLE = frozenset({"Glm46VVideoProcessor", "Glm4vVideoProcessor", "Qwen3VLVideoProcessor"})
"""Limits in pixels are for all frames of a video together."""
