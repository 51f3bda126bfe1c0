"""Llama 4: chunked attention, tiles between two ids, and features that the model projects where it merges them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tokenprune.adapters._generic import Generic
from tokenprune.adapters._tiles import pictures_by_marks
from tokenprune.interfaces.visual import Pictures
from tokenprune.registry import register_model


@register_model("llama4")
class Llama4(Generic):
    """Stock `Llama4ForConditionalGeneration`."""

    classes = ("Llama4ForConditionalGeneration",)
    features_at_places = False  # what comes out of the tower is projected behind the features call

    def __init__(self, model: Any) -> None:
        check_answers(type(model))
        super().__init__(model)

    def pictures(self, kind: str, ids: Tensor | None, places: Sequence[Tensor]) -> Pictures:
        config = self.model.config
        return pictures_by_marks(ids, places, config.boi_token_id, config.eoi_token_id)


def check_answers(cls: type) -> None:
    """Raise TypeError where the class as transformers has it answers nothing: 5.24 reads `image_outputs` off what its
    text model returns, which has none."""
    forward = inspect.unwrap(cls.forward)  # type: ignore[attr-defined]
    returned = getattr(sys.modules[forward.__module__], "MoeCausalLMOutputWithPast", None)
    if "image_outputs" not in forward.__code__.co_names or returned is None or hasattr(returned, "image_outputs"):
        return
    raise TypeError(
        f"{cls.__name__} fails in this release of transformers at every call, pruned or not: it reads image_outputs "
        f"off the {returned.__name__} of its text model, which has none. Use a release in which it answers, or give it "
        f"one: transformers.modeling_outputs.{returned.__name__}.image_outputs = None."
    )
