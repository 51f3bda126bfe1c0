"""What differs between releases of transformers: the names of arguments and outputs, read here and nowhere else."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

CANDIDATE_GENERATOR = "_get_candidate_generator"  # the method of a model that makes what proposes drafts
_CACHE = ("cache", "past_key_values", "layer_past")
"""The newer name, since 5.24, the older one, which goes with 5.40, and that of GPT-NeoX' layers."""


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a model, decoder or layer; None if there is none."""
    return next((kwargs[name] for name in _CACHE if kwargs.get(name) is not None), None)


def cache_in(output: Any) -> Any:
    """The KV cache in the output of a model or decoder; None if there is none."""
    return next((found for name in _CACHE if (found := getattr(output, name, None)) is not None), None)


@functools.cache
def cache_name() -> str:
    """What the installed release calls the KV cache, as an argument and in outputs."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    fields = BaseModelOutputWithPast.__dataclass_fields__
    return next((name for name in _CACHE if name in fields), _CACHE[0])


def cache_argument(cache: Any) -> dict[str, Any]:
    """The KV cache as an argument of a model or of `generate`: `model(**inputs, **cache_argument(cache))`."""
    return {cache_name(): cache}
