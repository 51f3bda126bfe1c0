"""Fuyu: no tower, each patch goes into the decoder by itself, and the processor ends each row of patches with one id.

The patches of all pictures come in one tensor, without a word on whose they are: that, and how they stand, is read off
the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from tokenprune.adapters._generic import Generic
from tokenprune.adapters._tiles import pictures_by_rows
from tokenprune.interfaces.visual import Pictures, Visual, unplaced
from tokenprune.registry import register_model


@register_model("fuyu")
class Fuyu(Generic):
    """Stock `FuyuForCausalLM`."""

    classes = ("FuyuForCausalLM",)
    pixel_names: ClassVar[dict[str, tuple[str, ...]]] = {
        "image": ("pixel_values", "image_patches"),  # the second before transformers 5.23
        "video": (),
    }

    def feature_rows(self, output: Any) -> list[Tensor]:
        return list(output.last_hidden_state.flatten(0, -2)[:, None])

    def visuals_behind(self, kind: str, call: Mapping[str, Any], output: Any) -> list[Visual]:
        return [unplaced(1)] * len(self.feature_rows(output))

    def pixel_rows(self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        return list(call[self.pixels[kind]].flatten(0, -2))

    def pictures(self, kind: str, ids: Tensor | None, places: Sequence[Tensor]) -> Pictures:
        return pictures_by_rows(ids, places)
