"""Tiny random checkpoints of model classes that tokenprune covers inside vLLM, whose CPU kernels want heads of 32."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from _paths import ROOT

CLASSES = {
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
}
"""By the names of `_families`, those that no pocket model is of."""
TEXT = {
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
}  # fmt: skip
TOWER = {"hidden_size": 64, "num_attention_heads": 2}
_QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
MARKS = {
    "llava_next": "<image>", "llava_onevision": "<image>", "internvl": "<IMG_CONTEXT>", "qwen2_vl": _QWEN,
    "qwen3_vl": _QWEN,
}  # fmt: skip


def prompt(name: str, pictures: int, kind: str = "image") -> str:
    """A question about so many pictures."""
    mark = MARKS[name]
    if kind == "video":
        mark = mark.replace("image", "video").replace("<IMG_CONTEXT>", "<video>")
    return "user what is this " + f"{mark} where " * pictures + "who is red assistant"


def save(name: str, folder: Path) -> None:
    """A checkpoint of a class, with the files of its processor."""
    evals = str(ROOT / "tests" / "evals")
    if evals not in sys.path:
        sys.path.append(evals)
    import _families
    import _processors

    _families.family.cache_clear()
    small = _families.family(name)
    config = small.config
    text = config.get_text_config()
    for key, value in TEXT.items():
        setattr(text, key, value)
    _wider(name, config.vision_config)
    if hasattr(text, "rope_parameters") and "mrope_section" in (text.rope_parameters or {}):
        text.rope_parameters = {**text.rope_parameters, "mrope_section": [6, 5, 5]}
    if hasattr(text, "layer_types"):
        text.layer_types = ["full_attention"] * TEXT["num_hidden_layers"]
    if name == "llava_onevision":
        config.vision_config.vision_use_head = False  # as in its published checkpoints
        config.vision_aspect_ratio = "anyres_max_9"
        config.image_grid_pinpoints = [[28, 56], [56, 28], [56, 56], [84, 84], [28, 112], [112, 112]]
    model = _families._build(type(small), config, "sdpa", 0)
    files = dict(_processors.FILES)
    _families.family.cache_clear()
    original, _processors.family = _processors.family, lambda which: model
    try:
        if name == "llava_onevision":
            found = files[name]
            image = {**found.image, "image_grid_pinpoints": config.image_grid_pinpoints}
            settings = {**found.settings, "vision_aspect_ratio": "anyres_max_9"}
            _processors.FILES[name] = type(found)(**{**vars(found), "image": image, "settings": settings})
        _processors.save_checkpoint(name, folder)
    finally:
        _processors.family, _processors.FILES[name] = original, files[name]


def _wider(name: str, vision: Any) -> None:
    """Heads of 32 in the tower, and what its output has to be."""
    if name.startswith("qwen"):
        vision.num_heads = 2
        if name == "qwen2_vl":
            vision.embed_dim, vision.hidden_size = 64, TEXT["hidden_size"]
        else:
            vision.hidden_size, vision.out_hidden_size = 64, TEXT["hidden_size"]
        return
    for key, value in TOWER.items():
        setattr(vision, key, value)
