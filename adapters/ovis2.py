"""Ovis 2: the tiles of a picture between two ids, with one between them that says where the next stands."""

from __future__ import annotations

from tokenprune.adapters._tiles import FramedPrompts
from tokenprune.registry import register_model


@register_model("ovis2")
class Ovis2(FramedPrompts):
    """Stock `Ovis2ForConditionalGeneration`."""

    classes = ("Ovis2ForConditionalGeneration",)
