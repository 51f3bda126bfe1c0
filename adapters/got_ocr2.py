"""GOT-OCR 2: a SAM tower over a page, over tiles of it, or over the pages of a document.

The processor puts a picture's tiles, or a document's pages, in one unbroken run of placeholders between <img> and
</img>: they are one picture.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenprune.adapters._generic import Generic
from tokenprune.adapters._tiles import pictures_by_run
from tokenprune.interfaces.visual import Pictures
from tokenprune.registry import register_model


@register_model("got_ocr2")
class GotOcr2(Generic):
    """Stock `GotOcr2ForConditionalGeneration`."""

    classes = ("GotOcr2ForConditionalGeneration",)

    def pictures(self, kind: str, ids: Tensor | None, places: Sequence[Tensor]) -> Pictures:
        return pictures_by_run(places)
