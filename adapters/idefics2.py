"""Idefics2: a perceiver makes a fixed number of latents of each picture of a prompt; they stand in no grid.

All pictures of a prompt count as one visual, with latents of each as a raster: `keep` is per prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenprune.adapters._generic import Generic
from tokenprune.interfaces.visual import Raster, Visual
from tokenprune.registry import register_model


@register_model("idefics2")
class Idefics2(Generic):
    """Stock `Idefics2ForConditionalGeneration`."""

    classes = ("Idefics2ForConditionalGeneration",)

    def visuals_behind(self, kind: str, call: Mapping[str, Any], output: Any) -> list[Visual]:
        count = self.model.config.perceiver_config.resampler_n_latents
        found = []
        for latents in self.feature_rows(output):
            pictures = range(len(latents) // count)
            rasters = tuple(Raster((1, count), picture * count, "unplaced") for picture in pictures)
            found.append(Visual(rasters, scattered=True))
        return found
