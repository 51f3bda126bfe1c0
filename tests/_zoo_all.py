"""All families of the zoo, the plans that they are tried on, and what each of them lacks."""

from __future__ import annotations

from typing import Any

import _zoo_masks  # noqa: F401
import _zoo_merging  # noqa: F401
import _zoo_patches  # noqa: F401
import _zoo_pictures  # noqa: F401
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
}
CELLS = [(name, plan) for name in FAMILIES for plan in PLANS]
_SIGNALS, _CUTS, _GRID = "has no decoder signals", "has no layer cuts", "works on a grid"
LACKS: dict[tuple[str, str], str] = {
    **dict.fromkeys([(name, "uniform") for name in ("aria", "deepseek_ocr2", "idefics2", "molmo2")], _GRID),
    ("perception_lm", "uniform"): _GRID,
    **dict.fromkeys([(name, "uniform") for name in ("gemma4", "gemma4_window", "gemma4_moe")], _GRID),
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
    ("mistral_large4", "layer_2"): _CUTS,
    **dict.fromkeys(
        [
            (name, plan)
            for name in (
                "gemma4_moe", "paligemma2", "lfm2_vl",
            )
            for plan in ("fastv", "pyramiddrop")
        ],
        _SIGNALS,
    ),
    **dict.fromkeys([(name, "fastv") for name in ("gemma4", "gemma4_window")], _SIGNALS),
    **dict.fromkeys([(name, "pyramiddrop") for name in ("gemma4", "gemma4_window")], _CUTS),
    ("cohere2_vision_window", "pyramiddrop"): _SIGNALS,
    **{(name, "vtc_cls"): "has no tower signals" for name in FAMILIES if name != "idefics3"},
}  # fmt: skip
"""By family and plan, what is said of a plan that the family cannot take: latents without a grid, keys from a latent,
layers without rotation, queries that are normalised once they are turned, keys that a layer takes over from another,
layers without attention, attention logits that are capped."""

__all__ = ["CELLS", "FAMILIES", "KEEP", "LACKS", "PLANS", "zoo_batch", "zoo_model"]
