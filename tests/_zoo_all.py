"""All families of the zoo, the plans that they are tried on, and what each of them lacks."""

from __future__ import annotations

from typing import Any

import _zoo_hybrid  # noqa: F401
import _zoo_later  # noqa: F401
import _zoo_masks  # noqa: F401
import _zoo_merging  # noqa: F401
import _zoo_patches  # noqa: F401
import _zoo_pictures  # noqa: F401
import _zoo_rare  # noqa: F401
import _zoo_timm  # noqa: F401
from _zoo import FAMILIES, zoo_batch, zoo_model

KEEP = 4
PLANS: dict[str, Any] = {
    "random": "random",
    "uniform": "uniform",
    "divprune": "divprune",
    "layer_2": {"at": "layer:2", "prune": "random", "keep": KEEP},
    "fastv": "fastv",
    "pyramiddrop": "pyramiddrop",
    "vtc_cls": "vtc_cls",
    "vision_0": {"at": "vision:0", "prune": "random", "keep": 2},
}
PICTURES = {"vision_0": [1, 1]}
"""Pictures of each row, where a cell is dear: the masked tower is run once for each of its patches."""
CELLS = [(name, plan) for name in FAMILIES for plan in PLANS]
_SIGNALS, _CUTS, _GRID = "has no decoder signals", "has no layer cuts", "works on a grid"
_WHOLE = "this family's tower cannot be cut"
_HIDES = "has no tower cuts of this image"
LACKS: dict[tuple[str, str], str] = {
    **dict.fromkeys([(name, "uniform") for name in ("aria", "deepseek_ocr2", "idefics2", "molmo2")], _GRID),
    **dict.fromkeys([(name, "uniform") for name in ("gemma4", "gemma4_window", "gemma4_moe", "gemma4_unified")], _GRID),
    **dict.fromkeys([(name, "fastv") for name in ("kimi_k25", "hunyuan_vl", "step3p7", "mistral_large4")], _SIGNALS),
    **dict.fromkeys(
        [
            (name, "pyramiddrop")
            for name in (
                "kimi_k25", "hunyuan_vl", "step3p7", "mistral_large4", "exaone4_5", "aya_vision", "cohere2_vision",
            )
        ],
        _SIGNALS,
    ),
    **dict.fromkeys([("hy_v4_vl", plan) for plan in ("fastv", "pyramiddrop")], _SIGNALS),
    **dict.fromkeys([(name, "layer_2") for name in ("mistral_large4", "hy_v4_vl")], _CUTS),
    ("apertus1p5", "vtc_cls"): "has no tower signals",
    **dict.fromkeys([("llama4", plan) for plan in ("fastv", "pyramiddrop")], _SIGNALS),
    **dict.fromkeys([("gemma3n", plan) for plan in ("layer_2", "pyramiddrop")], _CUTS),
    ("gemma3n", "fastv"): _SIGNALS,
    **dict.fromkeys(
        [
            (name, plan)
            for name in (
                "gemma4_moe", "paligemma2", "lfm2_vl", "qwen3_5", "qwen3_5_moe", "minicpmv4_6",
                "minicpmv4_7", "minicpm_ocr", "lfm3_vl", "muse_glimmer", "muse_spark", "gemma4_unified", "dots3_note",
            )
            for plan in ("fastv", "pyramiddrop")
        ],
        _SIGNALS,
    ),
    **dict.fromkeys([(name, "fastv") for name in ("gemma4", "gemma4_window")], _SIGNALS),
    **dict.fromkeys([(name, "pyramiddrop") for name in ("gemma4", "gemma4_window")], _CUTS),
    ("cohere2_vision_window", "pyramiddrop"): _SIGNALS,
    ("cohere_compass", "pyramiddrop"): _SIGNALS,
    **dict.fromkeys(
        [
            (name, "vtc_cls")
            for name in (
                "gemma4", "gemma4_window", "gemma4_moe", "molmo2", "video_llava", "idefics2", "got_ocr2",
                "deepseek_ocr2", "aria", "step3p7", "gemma4_unified", "lfm3_vl", "muse_glimmer", "muse_spark",
                "chameleon", "emu3", "fast_vlm", "perception_lm", "llama4", "fuyu", "gemma3n", "phi4_multimodal",
            )
        ],
        "has no tower signals",
    ),
    **dict.fromkeys(
        [
            (name, "vision_0")
            for name in (
                "apertus1p5", "aria", "chameleon", "emu3", "fast_vlm", "fuyu", "gemma3n", "gemma4_unified", "got_ocr2",
                "granite4_vision", "idefics2", "lfm3_vl", "perception_lm", "phi4_multimodal", "video_llava",
            )
        ],
        _WHOLE,
    ),
    **dict.fromkeys(
        [
            (name, "vision_0")
            for name in (
                "deepseek_ocr2", "gemma4", "gemma4_window", "gemma4_moe", "llama4", "minicpmv4_6", "minicpmv4_7",
                "minicpm_ocr", "molmo2", "muse_glimmer", "muse_spark", "step3p7",
            )
        ],
        _HIDES,
    ),
}  # fmt: skip
"""By family and plan, what is said of a plan that the family cannot take: latents without a grid, keys from a latent,
layers without rotation, queries that are normalised once they are turned, keys that a layer takes over from another,
layers without attention, attention logits that are capped, rotation by complex numbers; towers that pool patches by
their places or by attention, mix them in convolutions, have neighbourhoods, are told by a mask which patches are
picture, or are two."""

__all__ = ["CELLS", "FAMILIES", "KEEP", "LACKS", "PICTURES", "PLANS", "zoo_batch", "zoo_model"]
