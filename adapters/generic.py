"""Any class without a file of its own: read off the loaded model, and tried before it is pruned."""

from __future__ import annotations

from tokenprune.adapters._generic import Generic
from tokenprune.adapters._not_applicable import FAILS_THE_TRIAL, NOT_APPLICABLE
from tokenprune.adapters._video_processors import BY_FRAME, WHOLE
from tokenprune.registry import register_model

VIDEOS_BY_FRAME, WHOLE_VIDEOS = BY_FRAME, WHOLE
"""Video processors that something can stand in for, by what their limits in pixels are for: see the file."""
MISSING = {**NOT_APPLICABLE, **FAILS_THE_TRIAL}
"""Image-text classes of transformers that cannot be pruned, and why: the end of a sentence."""


@register_model("generic")
class AnyFamily(Generic):
    """An image-text class of transformers, of a subclass or of remote code, as far as it verifies."""
