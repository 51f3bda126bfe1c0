"""Qianfan-OCR: an InternVL whose tiles make pictures as InternVL's do.

The processor puts a picture's tiles in one unbroken run of placeholders between <img> and </img>: they are one picture.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenprune.adapters._generic import Generic
from tokenprune.adapters._tiles import pictures_by_run
from tokenprune.interfaces.visual import Pictures
from tokenprune.registry import register_model


@register_model("qianfan_ocr")
class QianfanOCR(Generic):
    """Stock `QianfanOCRForConditionalGeneration`."""

    classes = ("QianfanOCRForConditionalGeneration",)

    def pictures(self, kind: str, ids: Tensor | None, places: Sequence[Tensor]) -> Pictures:
        return pictures_by_run(places)
