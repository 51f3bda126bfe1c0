"""Any class without a file of its own: read off the loaded model, and tried before it is pruned."""

from __future__ import annotations

from tokenprune.adapters._generic import Generic
from tokenprune.registry import register_model


@register_model("generic")
class AnyFamily(Generic):
    """An image-text class of transformers, of a subclass or of remote code, as far as it verifies."""
